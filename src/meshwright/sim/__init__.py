"""The simulator: a step as tasks in streams, run by `sweep` or, where tasks share links or cores, by `flows`.

`program`    what a rank does, block by block or operator by operator
`build`      the programs of all ranks of a case, joined by messages
`tasks`      programs as one graph of tasks, folded or with every device
`step`       running it: the simulated evaluator
`timeline`   the critical path, idle time, memory over time, traces
`conditions` stragglers, slow links, jitter
`flows`, `network`, `sharing`   max-min fair shares; links and routes of a cluster; transfers as flows over them
`evaluators` what predicts, by name
"""
