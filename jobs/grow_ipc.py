"""The entrypoint of a Ray job for more images per class on a run that is there: `grow_ipc.py --config C ipc=[10,50]`.

Only what depends on the IPC is done. Where the rest (captions, latents, the fine-tuned model) is not complete, it
refuses: that would be a run of its own, which jobs/distill.py does.
"""

import sys

from vlcp_dist.cli import main

DEPENDS_ON_IPC = ("prototypes", "synthesize", "baselines", "evaluate")

if __name__ == "__main__":
    sys.argv[1:1] = ["run", *(word for stage in DEPENDS_ON_IPC for word in ("--only", stage))]
    main()
