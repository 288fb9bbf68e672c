"""The report: numbers in the right places, one self-contained page, partial runs, hostile names, many classes."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev

import pytest
from PIL import Image

from vlcp_dist import config, pipeline, report
from vlcp_dist.data.images import BadImage
from vlcp_dist.engine.progress import Progress
from vlcp_dist.report import material, tables

MICRO = Path(__file__).parents[1] / "micro.yaml"
HOSTILE = '<b>zero</b> & "co"'
OVERRIDES = [
    "engine.kind=serial",
    "ipc=[1,3]",
    "data.classes=[digit-0,digit-1,digit-2]",
    "finetune.epochs=1",
    "synthesize.strategies=[DCS,L,DCS-shuffled]",
    "synthesize.num_inference_steps=2",
    "evaluate.baselines=[random,full]",
    "evaluate.seeds=[0,1]",
]


class Page(HTMLParser):
    """A parsed page: all tags with attributes, text by section, tables by the label of their box."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.sections: dict[str, str] = {"header": ""}
        self.tables: dict[str, list[list[str]]] = {}
        self.depth = 0
        self._section, self._label, self._in_cell = "header", "", False
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        if tag == "section":
            self._section = attributes["id"]
            self.sections[self._section] = ""
        if attributes.get("role") == "region":
            self._label = attributes["aria-label"]
            assert self._label not in self.tables, "labels of boxes are unique"
            self.tables[self._label] = []
        if tag == "tr":
            self.tables[self._label].append([])
        if tag in ("td", "th"):
            self.tables[self._label][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._in_cell = False
            self.tables[self._label][-1][-1] = " ".join(self.tables[self._label][-1][-1].split())

    def handle_data(self, data):
        self.sections[self._section] += data
        if self._in_cell:
            self.tables[self._label][-1][-1] += data + " "

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, section):
        return " ".join(self.sections[section].split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(Config, states, parsed page) of a small whole run whose first class has a hostile name."""
    root = tmp_path_factory.mktemp("report")
    names = root / "classes.txt"
    names.write_text(f"digit-0\t{HOSTILE}\ndigit-1\tdigit one\ndigit-2\tdigit two\n")
    cfg = config.load(MICRO, [*OVERRIDES, f"root={root}/run", f"data.class_names={names}"])
    states = pipeline.run(cfg, Progress())
    return cfg, states, Page(report.write(cfg, states))


def records_on_disk(states):
    paths = [p for s in states if s.stage.name in ("baselines", "evaluate") for p in s.folder.path.rglob("seed=*.json")]
    return [json.loads(path.read_text()) for path in paths if "done" not in path.parts]


def plus_minus(values):
    return f"{mean(values):.1f} ± {stdev(values):.1f}"


def test_accuracy_table_holds_the_means_of_the_records(finished):
    _, states, page = finished
    found = {}
    for record in records_on_disk(states):
        found.setdefault((record["method"], record["ipc"]), []).append(record)
    head, *rows, full = page.tables["accuracy table, convnet3"]
    assert head == ["method", "IPC 1", "IPC 3"]
    assert [row[0].split()[0] for row in rows] == ["random", "L", "DCS", "DCS-shuffled"]
    for row in rows:
        for ipc, cell in zip((1, 3), row[1:], strict=True):
            runs = found[row[0].split()[0], ipc]
            best, last = (plus_minus([r[name] for r in runs]) for name in ("top1_best", "top1_last"))
            assert cell == f"{best} last {last}"
    assert full[1].startswith(plus_minus([r["top1_best"] for r in found["full", "full"]]))
    text = page.text("accuracy")
    assert "seeds 0, 1 of convnet3" in text and "hard-label: image size 32, width 8, epochs 2" in text
    assert plus_minus([r["top1_best"] for r in found["DCS", 1]]) in page.text("header")


def test_results_json_keeps_the_protocol_and_drops_the_curves(finished):
    cfg, states, _ = finished
    listed = json.loads((Path(cfg.root) / "report/results.json").read_text())
    assert len(listed) == len(records_on_disk(states)) == 3 * 2 * 2 + 2 * 2 + 2
    for record in listed:
        assert record["protocol"]["net"] == "convnet3" and record["train_images"] > 0 and "seed" in record
        assert not {"curve", "per_class"} & record.keys()


def test_page_loads_nothing_from_elsewhere(finished):
    _, _, page = finished
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "poster"):
            allowed = r"data:image/(png|jpeg);base64,|#|classes/digit-\d\.html$|$"
            assert re.match(allowed, attributes.get(name, "")), attributes
    assert not re.search(r"url\(|@import|https?://", page.source)
    assert any("default-src 'none'" in meta.get("content", "") for meta in page.all("meta"))


def test_names_and_descriptions_are_escaped(finished):
    _, _, page = finished
    assert "<b>zero" not in page.source
    assert HOSTILE in page.text("images") and HOSTILE in page.text("text")
    assert "&lt;b&gt;" in page.source


def test_pictures_are_the_files_of_the_run(finished):
    _, states, page = finished
    folder = next(s.folder.path for s in states if s.stage.name == "synthesize")
    sheet = next(image for image in page.all("img") if image["alt"].startswith("digit one: 3 distilled images"))
    pixels = Image.open(io.BytesIO(base64.b64decode(sheet["src"].partition(",")[2])))
    for cluster in range(3):
        with Image.open(folder / f"DCS/ipc=3/train/digit-1/{cluster:04d}-0.png") as image:
            left = cluster * (32 + 2)
            assert pixels.crop((left, 0, left + 32, 32)).tobytes() == image.convert("RGB").tobytes()
    rows = page.tables["strategies compared"]
    assert [row[0] for row in rows] == ["strategy", "nearest real", "DCS", "L", "DCS-shuffled"]
    assert all(image["alt"] for image in page.all("img"))
    assert all(cell.get("scope") in ("row", "col") for cell in page.all("th"))


def test_fine_tuning_shows_its_curves_and_samples(finished):
    _, states, page = finished
    folder = next(s.folder.path for s in states if s.stage.name == "finetune")
    losses = json.loads((folder / "training.json").read_text())["loss"]
    text = page.text("curves")
    assert f"over {len(losses)} steps" in text and "Samples per second on 1 worker, the median" in text
    prompts = json.loads((folder / "samples" / "prompts.json").read_text())
    head, *rows = page.tables["sample images of fine-tuning"]
    assert head == ["description of", "epoch 1"] and [row[0] for row in rows] == [p["key"] for p in prompts]
    images = {image["alt"]: image["src"] for image in page.all("img")}
    for i, prompt in enumerate(prompts):
        shown = Image.open(io.BytesIO(base64.b64decode(images[f"{prompt['key']}, epoch 1"].partition(",")[2])))
        with Image.open(folder / "samples" / "epoch=001" / f"{i}.png") as image:
            assert shown.tobytes() == image.tobytes()


def test_text_prototypes_and_outliers_are_those_of_the_prototypes(finished):
    _, states, page = finished
    folder = next(s.folder.path for s in states if s.stage.name == "prototypes")
    table = json.loads((folder / "ipc=3/digit-1.json").read_text())
    for cluster in table["clusters"]:
        assert cluster["description"] in page.text("text")
        word, count = cluster["keywords"][0]
        assert f"{word} {count}" in page.text("text")
    alts = {image["alt"] for image in page.all("img")}
    for outlier in table["outliers"]:
        assert f"outlier {outlier['key']}" in alts and f"{outlier['score']:.2f}" in page.text("outliers")


def test_each_class_has_a_page_with_all_its_clusters(finished):
    cfg, states, page = finished
    links = {link["href"] for link in page.all("a") if link["href"].startswith("classes/")}
    assert links == {f"classes/digit-{d}.html" for d in range(3)}
    folder = next(s.folder.path for s in states if s.stage.name == "prototypes")
    for digit in range(3):
        one = Page(Path(cfg.root) / f"report/classes/digit-{digit}.html")
        source = " ".join(one.text(section) for section in one.sections)
        for ipc in (1, 3):
            table = json.loads((folder / f"ipc={ipc}/digit-{digit}.json").read_text())
            for cluster in table["clusters"]:
                assert cluster["description"] in source and cluster["nearest"] in source
                assert ", ".join(cluster["members"]) in source
                assert all(f"{word} {count}" in source for word, count in cluster["keywords"])
            assert all(f"{outlier['key']} {outlier['score']:.3f}" in source for outlier in table["outliers"])
            assert ", ".join(table["nonrepresentative"]) in source
        alts = [image["alt"] for image in one.all("img")]
        assert sum(alt.startswith("distilled") for alt in alts) == sum(alt.startswith("real") for alt in alts) == 3
    assert "<b>zero" not in Page(Path(cfg.root) / "report/classes/digit-0.html").source


def test_class_pages_are_drawn_anew_only_when_their_material_has_changed(finished, tmp_path):
    cfg, _, _ = finished
    shutil.copytree(cfg.root, tmp_path / "run")
    copy = cfg.model_copy(update={"root": str(tmp_path / "run")})
    pages = [tmp_path / f"run/report/classes/digit-{d}.html" for d in range(3)]
    before = [page.read_bytes() for page in pages]
    for page in pages[:2]:
        page.write_bytes(before[0][:2000])
    marker = next((tmp_path / "run").glob("prototypes-*/done/ipc=1_3/digit-1.json"))
    marker.write_text(marker.read_text().replace('"sha256": "', '"sha256": "0', 1))
    pages[2].unlink()
    report.write(copy, pipeline.status(copy))
    after = [page.read_bytes() for page in pages]
    assert after[0] == before[0][:2000] and after[2] == before[2]
    assert len(after[1]) > 2000
    for path in (tmp_path / "run").glob("synthesize-*/done/DCS/ipc=3/*.json"):
        record = json.loads(path.read_text())
        for name, facts in record["files"].items():
            if "/digit-0/" in name:
                facts["sha256"] = "0" * 64
        path.write_text(json.dumps(record))
    report.write(copy, pipeline.status(copy))
    assert len(pages[0].read_bytes()) > 2000 and pages[2].read_bytes() == before[2]


def test_stage_table_and_configuration(finished):
    cfg, states, page = finished
    head, *rows, total = page.tables["time of each stage"]
    assert [row[0] for row in rows] == [state.stage.name for state in states]
    evaluate = dict(zip(head, rows[-1], strict=True))
    assert evaluate["units"] == "12 of 12" and evaluate["samples"] == f"{2 * 3 * (3 + 9):,}"
    assert total[3] == "0" and "No sample failed." in page.text("time")
    assert "VAE PSNR" in page.text("time")
    again = config.load(Path(cfg.root) / "report/config.yaml")
    assert again == cfg


def test_same_run_gives_the_same_page(finished):
    cfg, _, page = finished
    assert report.write(cfg, pipeline.status(cfg)).read_text() == page.source


def test_fresh_run_says_so_in_every_section(tmp_path, micro):
    cfg = micro()
    page = Page(report.write(cfg, pipeline.status(cfg)))
    assert "No result yet" in page.text("header") and "index 0 of 1" in page.text("header")
    for section in ("accuracy", "images", "text", "outliers", "curves"):
        assert "Nothing yet" in page.text(section)
    assert json.loads((Path(cfg.root) / "report/results.json").read_text()) == []


def test_half_finished_run_shows_what_is_there(finished, tmp_path):
    cfg, states, _ = finished
    root = tmp_path / "run"
    shutil.copytree(cfg.root, root)
    for state in states:
        if state.stage.name in ("finetune", "evaluate"):
            shutil.rmtree(root / state.folder.path.name)
        if state.stage.name == "synthesize":
            shutil.rmtree(root / state.folder.path.name / "done/DCS/ipc=3")
    half = cfg.model_copy(update={"root": str(root)})
    page = Page(report.write(half, pipeline.status(half)))
    header = page.text("header")
    assert "finetune 0 of 1" in header and "evaluate 0 of 12" in header and "No result yet" in header
    assert [row[0].split()[0] for row in page.tables["accuracy table, convnet3"]] == ["method", "random", "full"]
    assert "DCS at IPC 1." in page.text("images")
    assert "Nothing yet: the loss" in page.text("curves") and "Nothing yet" not in page.text("text")


def test_many_classes_and_lost_images_are_told(finished, tmp_path, monkeypatch):
    cfg, _, _ = finished
    monkeypatch.setattr(material, "SHOWN_CLASSES", 2)

    def lost(self, rows):
        return [(row, BadImage("the disk is gone")) for row in rows]

    monkeypatch.setattr("vlcp_dist.stages.base.Run.read", lost)
    page = Page(report.write(cfg, pipeline.status(cfg)))
    for section in ("images", "outliers"):
        assert "1 more classes are not shown" in page.text(section) and "digit two" not in page.text(section)
    assert "All 3 classes 1 of them not above" in page.text("text") and "digit two" in page.text("text")
    assert "DCS/ipc=3/" in page.text("images")
    assert "could not be read for this page" in page.text("time") and "the disk is gone" in page.text("time")


def summary(method, ipc, best, std, seeds=3):
    return {
        "method": method, "ipc": ipc, "net": "resnet18", "seeds": seeds, "train_images": 10,
        "best_mean": best, "best_std": std, "last_mean": best - 1, "last_std": std,
    }  # fmt: skip


def test_headline():
    rows = [summary("full", "full", 99.1, 0, 1), summary("random", 1, 69.7, 2.1), summary("DCS", 1, 90.06, 0.42)]
    assert tables.headline(rows, "DCS") == (
        "At 1 image per class: DCS 90.1 ± 0.4 %, random real images 69.7 ± 2.1 %, full data 99.1 %."
    )
    assert tables.headline(rows, "L") is None


def test_best_and_second_of_a_column():
    rows = [
        summary("random", 10, 50, 1),
        summary("L", 10, 70, 1),
        summary("DCS", 10, 60.04, 1),
        summary("GGS", 10, 60, 1),
    ]
    table = tables.accuracy_table([*rows, summary("full", "full", 99, 0, 1)])
    ranks = {row["method"]: row["cells"][0]["best_rank"] for row in table["rows"]}
    assert ranks == {"random": 3, "L": 1, "DCS": 2, "GGS": 2}  # what is printed alike is marked alike
    assert table["full"]["best"] == "99.0" and table["full"]["best_rank"] is None
    assert table["full"]["seeds"] == 1  # fewer than the others: the page says so


def test_text_effect_tells_clear_differences_from_noise():
    rows = [
        *(summary("DCS", ipc, 80, 1) for ipc in (1, 10)),
        *(summary("L", ipc, 79, 1) for ipc in (1, 10)),
        summary("DCS-shuffled", 1, 40, 1),
        summary("DCS-shuffled", 10, 80, 1),
    ]
    effect = tables.text_effect(rows)
    # standard error: sqrt(1/3 + 1/3) = 0.816; one point is less than twice that
    assert [cell["beyond_noise"] for cell in effect["rows"][0]["cells"].values()] == [False, False]
    assert [cell["beyond_noise"] for cell in effect["rows"][1]["cells"].values()] == [True, False]
    assert effect["sentences"] == [
        "Averaged over the IPCs, the text prototypes (DCS) change top-1 by +1.0 points against the class name alone "
        "(L; clear at 0 of 2 IPCs).",
        "Shuffling the same texts between classes (DCS-shuffled) changes it by −20.0 points: what the images show "
        "follows the text, clearly at 1 of 2 IPCs.",
    ]
    assert tables.text_effect([summary("DCS", 1, 80, 1)]) is None


def test_protocol_text_tells_what_depends_on_the_ipc():
    records = [
        {"ipc": ipc, "protocol": {"net": "convnet3", "epochs": epochs, "lr": 0.01, "width": None, "name": "hard-label"}}
        for ipc, epochs in ((1, 150), (5, 150), ("full", 12))
    ]
    assert tables.protocol_text(records) == "hard-label: epochs 150 at IPC 1, 5; 12 at full data, lr 0.01"


def test_recognised_is_the_mean_over_seeds_and_left_out_when_absent(finished):
    _, states, page = finished
    records = records_on_disk(states)
    shares = {}
    for record in records:
        if record["method"] == "DCS-shuffled":
            shares.setdefault(record["ipc"], []).append(record["recognised"])
    head, *rows = page.tables["recognised distilled images, convnet3"]
    assert head == ["strategy", "IPC 1", "IPC 3"] and [row[0] for row in rows] == ["L", "DCS", "DCS-shuffled"]
    assert rows[-1][1:] == [f"{mean(shares[ipc]):.1f}" for ipc in (1, 3)]
    for record in records:
        record.pop("recognised", None)
    assert tables.recognised(records) is None
