"""Two-level methods: a model is cut into stages over groups of devices, and each is placed inside its group.

`search.stages` is the problem and the judge; here are the methods, one file each, as pure functions from a stage
problem to a plan, and how they answer questions about models (`planning`). Importing this registers them.
"""

from meshwright.search.pipelines.alpa import alpa
from meshwright.search.pipelines.exhaustive_stages import exhaustive_stages
from meshwright.search.pipelines.ftpipe import ftpipe
from meshwright.search.pipelines.gpipe import gpipe
from meshwright.search.pipelines.greedy import greedy
from meshwright.search.pipelines.layerwise import layerwise
from meshwright.search.pipelines.metis import metis
from meshwright.search.pipelines.pipedream import pipedream
from meshwright.search.pipelines.piper import piper
from meshwright.search.pipelines.planning import two_level
from meshwright.search.pipelines.random_stages import random_stages
from meshwright.search.pipelines.rannc import rannc

two_level("alpa", alpa)
two_level("pipedream", pipedream)
two_level("piper", piper, recomputes=True)
two_level("rannc", rannc, recomputes=True)
two_level("ftpipe", ftpipe)
two_level("gpipe", gpipe, recomputes=True, takes_cuts=True)
two_level("greedy", greedy)
two_level("metis", metis)
two_level("layerwise", layerwise, recomputes=True, with_switches=True)
two_level("random_stages", random_stages)
two_level("exhaustive_stages", exhaustive_stages)
