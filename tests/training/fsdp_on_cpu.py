"""Runs a training script on CPUs as `accelerate launch --config_file training/fsdp2.yaml` runs it on GPUs.

Accelerate keeps FSDP for accelerators: `AcceleratorState.__init__` drops the plugin that the launcher asked for where
processes are `MULTI_CPU`. torch's `fully_shard` runs there, with gloo, so the state is told to keep it; all else is
Accelerate's, the Trainer's and ours.
"""

import runpy
import sys

from accelerate.state import AcceleratorState, DistributedType, PartialState

on_accelerators = AcceleratorState.__init__


def on_cpus(self, *args, fsdp_plugin=None, **kwargs):
    on_accelerators(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = on_cpus
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
