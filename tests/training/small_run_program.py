"""`small_runs` as a program, for launchers: OUTPUT_DIR, and the arguments and the run as JSON."""

import json
import os
import signal
import sys
import time

import torch
from small_runs import OBJECTIVES, build_arguments, run_small

from mixlm.errors import exits_on_user_error


@exits_on_user_error
def main(output_dir: str, arguments: str, run: str = "{}") -> None:
    """With `run` {"dies": rank} that rank is killed in the second step, with {"hangs": rank} it sleeps there."""
    torch.set_num_threads(1)
    options = json.loads(run)
    dies, hangs = options.pop("dies", None), options.pop("hangs", None)

    class Fails(OBJECTIVES["SOP"]):
        steps = 0

        def begin_step(self, micro_batches):
            Fails.steps += 1
            if Fails.steps == 2 and self.accelerator.process_index == dies:
                os.kill(os.getpid(), signal.SIGKILL)
            if Fails.steps == 2 and self.accelerator.process_index == hangs:
                time.sleep(600)
            return super().begin_step(micro_batches)

    run_small(build_arguments(output_dir, **json.loads(arguments)), objective_class=Fails, **options)


if __name__ == "__main__":
    main(*sys.argv[1:])
