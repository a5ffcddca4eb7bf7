"""A simulated multi-surface log with known truth.

simulate                 writes a world's log, items, queries and truth, out of core
best_reachable_recall    what no retriever can exceed on it in expectation
load_world               the world back, for its `response` (a simulated online test: `Block.walk` of walk.py)
"""

from pinrec_hf.data.simulator.log import SimulationReport, load_world, simulate
from pinrec_hf.data.simulator.oracle import best_reachable_recall
from pinrec_hf.data.simulator.parameters import GENERATOR_VERSION, OUTCOMES, SURFACES, WORLDS
from pinrec_hf.data.simulator.world import World

__all__ = [
    "GENERATOR_VERSION",
    "OUTCOMES",
    "SURFACES",
    "WORLDS",
    "SimulationReport",
    "World",
    "best_reachable_recall",
    "load_world",
    "simulate",
]
