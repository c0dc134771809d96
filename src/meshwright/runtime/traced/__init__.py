"""Plans of traced modules, carried out: each rank computes on its local shards what the planner's rules say.

`redistribute` brings a local tensor along the planner's own steps, and its gradient back; `kernels` and `local` do one
call of a program on local operands; `execute` runs a whole program under a strategy on one rank; `check` holds many
plans against one device.
"""
