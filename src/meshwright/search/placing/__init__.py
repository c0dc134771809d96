"""Methods that place whole operator graphs on one mesh: a choice for every operator and everything at rest.

The space is `search.operators`, the evaluator `cost.placed`; a method is a file here, which says from which paper it
comes, what that paper optimises, and what differs. They register themselves when this is imported.
"""

from meshwright.search.placing.answer import register
from meshwright.search.placing.classics import data_parallel, fsdp, megatron
from meshwright.search.placing.double_recursive import divide
from meshwright.search.placing.drawn import draw, exhaust
from meshwright.search.placing.flexflow import walk
from meshwright.search.placing.gspmd import complete
from meshwright.search.placing.solvers import by_solver, operators
from meshwright.search.placing.tensoropt import track

register("operators", operators, recomputes=True)
for solver in ("elimination", "ilp", "beam", "annealing", "portfolio"):
    register(solver, by_solver(solver), recomputes=True)
register("flexflow", walk)
register("double_recursive", divide)
register("tensoropt", track, objectives=("step_time", "memory", "pareto"))
register("gspmd", complete, takes_annotations=True)
register("data_parallel", data_parallel)
register("fsdp", fsdp)
register("megatron", megatron)
register("random_operators", draw)
register("exhaustive_operators", exhaust)
