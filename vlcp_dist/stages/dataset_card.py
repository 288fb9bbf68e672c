"""The card of a distilled data set: what it is, how it was made, how it is loaded."""

import json

import vlcp_dist
from vlcp_dist.stages.base import Run

TEXTS = {
    "L": "the class name",
    "L+FK": "the class name and the feature keywords of its cluster",
    "GGS": "a sentence written from the feature keywords of its cluster",
    "DCS": "the description that best carries the keywords of its cluster",
    "DCS-shuffled": "the text prototype of another class, a control",
}


def dataset_card(run: Run, strategy: str, ipc: int) -> str:
    """`README.md` as the Hugging Face hub reads it; the folder it lies in can be uploaded as it is."""
    cfg, index = run.cfg, run.index
    classes = list(index.class_sizes)
    per_class = ipc * cfg.synthesize.images_per_prototype
    images = len(classes) * per_class
    settings = {
        "diffusion model": cfg.diffusion.model or "a small Stable Diffusion trained on the same images",
        "strength": cfg.synthesize.strength,
        "guidance_scale": cfg.synthesize.guidance_scale,
        "num_inference_steps": cfg.synthesize.num_inference_steps,
        "scheduler": cfg.synthesize.scheduler,
        "negative prompt": json.dumps(cfg.synthesize.negative_prompt),
        "seed": cfg.seed,
        "made by": f"vlcp_dist {vlcp_dist.__version__}, {run.folders['synthesize'].path.name}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    listed = "\n".join(f"| {index.labels[c]} | {c} | {index.names[c].replace('|', '/')} |" for c in classes)
    return f"""---
task_categories:
- image-classification
tags:
- dataset-distillation
size_categories:
- {_size_category(images)}
configs:
- config_name: imagefolder
  default: true
  data_dir: train
- config_name: webdataset
  data_files:
  - split: train
    path: webdataset/*.tar
---
# {images:,} images in place of {sum(index.class_sizes.values()):,}: {len(classes)} classes, {per_class} images of each

Distilled with the method of "Dataset Distillation via Vision-Language Category Prototype". Every image was made by a
diffusion model from the centre of a cluster of image latents and from a text: {TEXTS[strategy]}
(strategy {strategy}). The images are synthetic; the licence and the terms of the data set that they were distilled from
apply to what is done with them.

```python
load_dataset("imagefolder", data_dir="train", drop_labels=False)              # beside this file
load_dataset("webdataset", data_files="webdataset/*.tar")       # the same images; cls is the label
torchvision.datasets.ImageFolder("train")
```

`train/<class>/metadata.jsonl` tells of every image its class, cluster, prompt, seed and the key of the real image whose
description is its prompt. A label is the position of the class id in sorted order. A folder `soft_labels/`
beside this file, where there is one, holds a teacher's logits: a tensor for every class id, its rows in the order of
`metadata.jsonl`.

| setting | value |
| --- | --- |
{table}

| label | class id | class |
| --- | --- | --- |
{listed}
"""


def _size_category(images: int) -> str:
    names = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M"]
    return names[min(4, max(0, len(str(images)) - 3))]
