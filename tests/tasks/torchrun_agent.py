"""What `torchrun --max-restarts=3 --nproc-per-node=2 mirl ...` does, with its ranks forked instead of started anew."""

import sys

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mirl.cli import main as mirl


def rank():
    sys.exit(mirl())


def main():
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=3, start_method="fork", monitor_interval=0.2,
        run_id="test", rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", rdzv_configs={"is_host": True},
    )  # fmt: skip
    elastic_launch(config, rank)()
    return 0
