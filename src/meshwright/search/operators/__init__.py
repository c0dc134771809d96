"""The space of all placements of an operator graph on a mesh, as one instance of the choice problem.

Nodes are the operators (a choice is a split: which dim each mesh axis cuts), the activations at rest and the parameters
(a choice is a placement of the tensor and of its gradient), and, if asked for, the training state of parameters where
it may lie otherwise than they. Costs of nodes are seconds of computation and of the optimizer's update; costs of edges
are the redistributions between an operator and what it reads or makes, forward and backward. So the cost of a choice is
the time of a step in which nothing overlaps, the one that `cost.placed` finds for the strategy, written independently.

What must be equal is one node: all instances of a block, a tensor handed from block to block, parameters that are tied.
An activation at rest may be `SUMMANDS` only where a reader is linear and no backward needs it, and may be cut only
along dims that an operator next to it can split; parameters may be cut along any. A dim is cut only into equal pieces.

`space` has the nouns, `nodes` and `write` make them. Choices that no optimum needs are left to `choose.reduce`.
"""

from meshwright.search.operators.space import BlockPart, Node, OperatorSpace, Place, Splits, placed_strategy
from meshwright.search.operators.write import operator_space

__all__ = ["BlockPart", "Node", "OperatorSpace", "Place", "Splits", "operator_space", "placed_strategy"]
