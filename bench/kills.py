"""How many kills a run survives: kill -9 and SIGTERM at random moments; its end against the uninterrupted run's.

    python bench/kills.py --kills 100

Each time other numbers of data workers go on. Where a kill fell is told by the files that it left. Weights, optimizer
state and records (but for times) must be those of the uninterrupted run, bit for bit.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "tasks"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="of which one in five is a SIGTERM")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--out", type=Path, default=Path("bench/results/kills.json"))
    options = parser.parse_args()
    import killing
    from tiny_runs import assert_identical, finish

    began, phases = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as name:
        # Of four kills, three come after a step that is kept; two steps are an epoch.
        run = killing.KILLED_RUN | {"epochs": options.kills}
        whole = killing.start(run | {"out": f"{name}/whole", "workers": 0}, resume=False)
        shares = {signal.SIGKILL: options.kills - options.kills // 5, signal.SIGTERM: options.kills // 5}
        for number, count in shares.items():
            found = Counter()
            for phase in killing.survive(run | {"out": f"{name}/run"}, count, number=number, seed=options.seed):
                found[phase] += 1
                print(f"{number.name} {phase} ({found.total()} of {count})", flush=True)
            phases[number.name] = dict(found)
        for process in (whole, killing.start(run | {"out": f"{name}/run", "workers": 1}, resume=True)):
            code, _, errors = finish(process, timeout=3600)
            assert code == 0, errors
        assert_identical(f"{name}/run", f"{name}/whole")
    # Imported last: PyTorch would take memory from what runs.
    from recording import add, machine

    from mirl.training import processes

    about = {"command": " ".join(["python", *sys.argv]), "machine": machine(processes.launch("auto", 1, "32"))}
    result = {"kills": options.kills, "seed": options.seed, "phases": phases, "steps": 2 * options.kills}
    add({**about, **result, "identical": True, "seconds": round(time.monotonic() - began)}, options.out)


if __name__ == "__main__":
    main()
