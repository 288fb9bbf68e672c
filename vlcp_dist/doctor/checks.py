"""What `vlcp doctor` asks the nodes, and what it makes of their answers: each line is OK or says what to do."""

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vlcp_dist import pipeline
from vlcp_dist.data import storage
from vlcp_dist.doctor import fit
from vlcp_dist.doctor import node as on_node
from vlcp_dist.doctor.check import Check, Report
from vlcp_dist.engine import nodes
from vlcp_dist.engine.nodes import NoAnswer, Node
from vlcp_dist.models.captioner import LLAVA
from vlcp_dist.models.diffusion import SD15, SD15_FILES, SD15_PARTS
from vlcp_dist.schema import Config

SKEW = 5.0  # seconds; object stores refuse requests at 15 minutes, and logs of two nodes cannot be compared long before
SLOW = 5e6  # bytes per second of storage: a U-Net of 3.4 GB would take 11 minutes
USED = 0.1  # of a GPU's memory by other processes

Each = Callable[..., dict[Node, Any]]


def examine(cfg: Config, on_check: Callable[[Check], None] = lambda _: None) -> Report:
    """Look at everything; `on_check` is told each line as soon as it is known.

    With `engine: serial` this process stands for the one node there is.

    Raises:
        InputError: there is no cluster at the address given.
    """
    report = Report()
    started = cfg.engine.kind == "ray" and pipeline.connect(cfg.engine.address)
    try:
        for check in _checks(cfg, report):
            report.checks.append(check)
            on_check(check)
    finally:
        if started:
            import ray

            ray.shutdown()
    return report


def _checks(cfg: Config, report: Report) -> Iterator[Check]:
    ray_engine = cfg.engine.kind == "ray"
    everyone = nodes.alive_nodes() if ray_engine else [Node("", "this process", "127.0.0.1", {"CPU": 1})]
    each: Each = nodes.ask if ray_engine else _here
    answers = each(on_node.facts, {node: () for node in everyone})
    yield from _unanswered("node", answers, "see that its raylet runs and that vlcp-dist is installed there")
    facts = {node: answer for node, answer in answers.items() if not isinstance(answer, NoAnswer)}
    report.facts = {node.name: answer for node, answer in facts.items()}
    there = nodes.workers(facts)
    yield from _software(each, facts)
    yield from _gpus(facts, counted=ray_engine)
    yield from _clocks(each, there)
    yield from _disks(each, there)
    yield from _shared(cfg, each, there)
    yield from _weights(cfg, each, there)
    if ray_engine:
        yield from _reduce(there)
        yield from fit.workers(cfg)
    yield from fit.room(cfg)


def _here(function: Callable[..., Any], arguments: Mapping[Node, tuple[Any, ...]]) -> dict[Node, Any]:
    """As `nodes.ask`, in this process."""
    (node, values), *_ = arguments.items()
    try:
        return {node: function(*values)}
    except Exception as error:
        return {node: NoAnswer(f"{type(error).__name__}: {error}")}


def _software(each: Each, facts: Mapping[Node, dict[str, Any]]) -> Iterator[Check]:
    """Python, this package, and the libraries: the same on every node."""
    builds = each(nodes.build, {node: () for node in facts})
    mine = nodes.build()
    for node, found in builds.items():
        if found != mine:
            text = found.reason if isinstance(found, NoAnswer) else found
            remedy = (
                "install the same version everywhere, or `ray job submit --working-dir .`, which all nodes then run"
            )
            yield Check("code", False, f"{text}; this process runs {mine}", remedy, node.name)
    if all(found == mine for found in builds.values()):
        yield Check("code", True, f"{mine} on {_count(builds)}")
    differing = False
    for name in sorted({name for found in facts.values() for name in found["packages"]}):
        versions = Counter(found["packages"].get(name, "none") for found in facts.values())
        if len(versions) > 1:
            differing = True
            usual = versions.most_common(1)[0][0]
            odd = {n.name: v for n, f in facts.items() if (v := f["packages"].get(name, "none")) != usual}
            listed = ", ".join(f"{version} on {node}" for node, version in odd.items())
            yield Check(
                "libraries", False, f"{name} {usual}, but {listed}", "install from constraints.txt on every node"
            )
    if not differing and facts:
        found = next(iter(facts.values()))
        yield Check(
            "libraries", True, f"torch {found['packages']['torch']} and {len(found['packages']) - 1} more, equal"
        )


def _gpus(facts: Mapping[Node, dict[str, Any]], *, counted: bool) -> Iterator[Check]:
    """GPUs and memory of each node. `counted`: Ray has counted the GPUs as well."""
    for node, found in facts.items():
        gpus, memory = found["gpus"], f"{found['memory'] / 2**30:.0f} GiB memory, {found['cpus']} CPUs"
        if counted and node.gpus != len(gpus):
            yield Check(
                "GPUs", False,
                f"Ray counts {node.gpus:g}, the driver {len(gpus)}" + (f" ({found['no_gpus_because']})" * (not gpus)),
                "install the driver (in a container: the NVIDIA container toolkit) and restart Ray on this node; "
                "leave --num-gpus out, so that Ray counts them itself", node.name,
            )  # fmt: skip
        elif gpus and found["cuda"] is None:
            yield Check(
                "GPUs", False, f"{len(gpus)} x {gpus[0]['name']}, but torch is built without CUDA",
                "install torch with CUDA: `pip install -c constraints.txt 'vlcp-dist[gpu]'`", node.name,
            )  # fmt: skip
        elif busy := [gpu for gpu in gpus if gpu["memory_used"] > USED * gpu["memory"]]:
            yield Check(
                "GPUs", False,
                f"{len(busy)} of {len(gpus)} are in use: {busy[0]['memory_used'] / 2**30:.1f} of "
                f"{busy[0]['memory'] / 2**30:.0f} GiB are taken",
                "end what uses them (`nvidia-smi` lists it), or wait for the run that does", node.name,
            )  # fmt: skip
        elif gpus:
            kinds = Counter(f"{gpu['name']} {gpu['memory'] / 2**30:.0f} GiB" for gpu in gpus)
            listed = " and ".join(f"{n} x {kind}" for kind, n in kinds.items())
            driver = f"driver {found['driver']}, CUDA {found['cuda']}"
            yield Check("GPUs", True, f"{listed}, {driver}, {memory}", node=node.name)
        else:
            yield Check("GPUs", True, f"none, {memory}", node=node.name)


def _clocks(each: Each, there: list[Node]) -> Iterator[Check]:
    """A clock is off at least as far as what it shows lies outside the time in which it was asked."""
    before = time.time()
    answers = each(on_node.clock, {node: () for node in there})
    after = time.time()
    yield from _unanswered("clock", answers, "run it again")
    times = {node: shown for node, shown in answers.items() if not isinstance(shown, NoAnswer)}
    skews = {node: max(before - shown, shown - after, 0.0) for node, shown in times.items()}
    for node, skew in skews.items():
        if skew > SKEW:
            yield Check(
                "clock",
                False,
                f"off by {skew:.0f} s or more",
                "set it by NTP (`chronyc tracking` says how it is)",
                node.name,
            )
    if skews and max(skews.values()) <= SKEW:
        yield Check("clock", True, f"{_count(skews)} within {max(after - before, SKEW):.0f} s")


def _disks(each: Each, there: list[Node]) -> Iterator[Check]:
    answers = each(on_node.disk, {node: () for node in there})
    yield from _unanswered("disk", answers, "make room, or set VLCP_CACHE to a folder on a disk of this node")
    for node, disk in answers.items():
        if isinstance(disk, NoAnswer):
            continue
        found = f"writes {_rate(disk['write'])}, reads {_rate(disk['read'])}, {disk['free'] / 2**30:.1f} GiB free"
        ok = min(disk["write"], disk["read"]) > SLOW and disk["free"] > fit.ROOM
        yield Check("disk", ok, found, "" if ok else "set VLCP_CACHE to a folder on a faster disk with room", node.name)


def _shared(cfg: Config, each: Each, there: list[Node]) -> Iterator[Check]:
    """Every node writes a file below the root and reads the one of its neighbour; all of them must see all."""
    folder = storage.locate(cfg.root) / f".doctor-{uuid.uuid4().hex}"
    name = {node: f"node-{i:04d}" for i, node in enumerate(there)}
    try:
        wrote = each(on_node.write_probe, {node: (folder, name[node]) for node in there})
        yield from _unanswered(
            "storage", wrote, f"see that root={cfg.root} exists and may be written to from this node"
        )
        writers = [node for node, answer in wrote.items() if not isinstance(answer, NoAnswer)]
        neighbour = dict(zip(writers, writers[1:] + writers[:1], strict=True))
        read = each(on_node.read_probe, {node: (folder, name[neighbour[node]]) for node in writers})
        mine = set(storage.listing(folder))
    finally:
        each(on_node.clear_probes, {node: (folder,) for node in there})
        on_node.clear_probes(folder)
    yield from _unanswered("storage", read, f"see that root={cfg.root} can be read from this node")
    sight = {node: set(names) for node, (names, _) in _answered(read).items()}
    wanted = {name[node] for node in writers}
    blind = [node.name for node in writers if wanted - sight.get(node, wanted)]
    unseen = [node.name for node in writers if name[node] not in mine]
    found = [f"{len(blind)} of {len(writers)} nodes do not see what others write there ({', '.join(blind)})"] * bool(
        blind
    )
    if unseen:
        found += [f"this process does not see what {len(unseen)} of {len(writers)} nodes write ({', '.join(unseen)})"]
    if found:
        remedy = "give a folder that all nodes mount, or a URL such as s3://bucket/folder"
        yield Check("shared storage", False, f"root={cfg.root}: {'; '.join(found)}", remedy)
    elif writers:
        rates = min(_answered(wrote).values()), min(rate for _, rate in _answered(read).values())
        speed = f"written at {_rate(rates[0])}, read at {_rate(rates[1])}, or more, by {_count(writers)}"
        slow = min(rates) < SLOW
        yield Check("shared storage", not slow, f"root={cfg.root}: {speed}", "choose faster storage" if slow else "")
    if places := pipeline.inputs(cfg):
        lacks = each(on_node.missing, {node: (places,) for node in there})
        for node, absent in lacks.items():
            if isinstance(absent, NoAnswer) or absent:
                why = absent.reason if isinstance(absent, NoAnswer) else f"{', '.join(absent)} not seen from here"
                yield Check("inputs", False, why, "mount it on every node, or give a URL", node.name)
        if not any(lacks.values()):
            yield Check("inputs", True, f"{', '.join(places)} seen by {_count(lacks)}")
    elif cfg.data.path:
        yield Check("inputs", False, f"data.path={cfg.data.path} is not there", "check the path, or mount it")


def _weights(cfg: Config, each: Each, there: list[Node]) -> Iterator[Check]:
    """The weights that this run loads: present and whole."""
    wanted: dict[str, tuple[Any, ...]] = {}
    if cfg.diffusion.model:
        wanted["diffusion.model"] = (cfg.diffusion.model, cfg.diffusion.revision, SD15_PARTS, SD15, SD15_FILES)
    if cfg.caption.captioner == "llava":
        wanted["caption.model"] = (cfg.caption.model, cfg.caption.revision, ("",), LLAVA, ())
    for key, arguments in wanted.items():
        model = arguments[0]
        answers = each(on_node.model, dict.fromkeys(there, arguments))
        yield from _unanswered(key, answers, f"mend that, or give another {key}")
        if has := _answered(answers):
            yield Check(key, True, f"{model}: {next(iter(has.values()))} ({_count(has)})")


def _reduce(there: list[Node]) -> Iterator[Check]:
    """An all-reduce over one process per node: NCCL where there are GPUs, else gloo."""
    ranks = [node for node in there if node.gpus] or there
    backend = "nccl" if ranks and ranks[0].gpus else "gloo"
    if not ranks:
        return
    (port,) = nodes.ask(on_node.free_port, {ranks[0]: ()}).values()
    if isinstance(port, NoAnswer):
        yield Check(backend, False, port.reason, "run it again", ranks[0].name)
        return
    address = f"{ranks[0].address}:{port}"
    answers = nodes.ask(
        on_node.all_reduce,
        {node: (rank, len(ranks), address, backend) for rank, node in enumerate(ranks)},
        gpus=1 if backend == "nccl" else 0,
        timeout=2 * on_node.REDUCE_SECONDS,
    )
    yield from _unanswered(
        backend, answers,
        f"open all ports between the nodes (fine-tuning connects its processes), name their interface with "
        f"{backend.upper()}_SOCKET_IFNAME, and see that a GPU of each node is idle",
    )  # fmt: skip
    found = _answered(answers)
    if len(found) == len(ranks):
        slowest = max(answer["seconds"] for answer in found.values())
        yield Check(backend, True, f"all-reduce of 4 MiB over {_count(found)} in {slowest * 1000:.1f} ms")


def _unanswered(name: str, answers: Mapping[Node, Any], remedy: str) -> Iterator[Check]:
    for node, answer in answers.items():
        if isinstance(answer, NoAnswer):
            yield Check(name, False, answer.reason, remedy, node.name)


def _answered(answers: Mapping[Node, Any]) -> dict[Node, Any]:
    return {node: answer for node, answer in answers.items() if not isinstance(answer, NoAnswer)}


def _count(found: Any) -> str:
    return f"{len(found)} node{'s' * (len(found) != 1)}"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e6:.0f} MB/s"
