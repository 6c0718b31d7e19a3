"""The command line: verbs and options only. Torch is imported by the verbs that need it, never here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import cli_data
from bench.errors import BenchError
from bench.files import write_atomically
from bench.one_line import errors, one_line_errors
from bench.record import REPORT

app = typer.Typer(
    help="Compare PEFT methods for multi-task dense vision: parameters, memory, time and accuracy.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(cli_data.app, name="data")
DECODER = Annotated[str | None, typer.Option(help="segformer, hrnet or highres, in place of the protocol's choice.")]


@app.command()
@one_line_errors
def run(
    methods: Annotated[
        str | None,
        typer.Option(
            help="Expressions, e.g. 'ours,mtlora\\[rank=16]', grids 'ours\\[r=2|4|8]', 'all', or 'all,-lora'."
        ),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Short or timm names, comma-separated. (default: swin_tiny)")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="A card's name or a path to a YAML card. (default: scenes)")
    ] = None,
    data_root: Annotated[Path | None, typer.Option(help="Folder that the card's files lie in.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Comma-separated subset of the card's tasks. (default: the card's choice)")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="published: each paper's own decoder; equal: one for all. (default: published)")
    ] = None,
    decoder: DECODER = None,
    recipe: Annotated[
        str | None, typer.Option(help="A recipe's name or a path to a YAML file. (default: quick)")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="A named grid of cells, or a YAML file of one; other options override it.")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(help="448, or HEIGHTxWIDTH. (default: the recipe's, else the card's)")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="(default: the recipe's)")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Train this many epochs.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=0, help="Train this many steps; 0 measures efficiency alone.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, tf32, bf16 or fp16. (default: fp32)")] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="low: activation checkpointing, the same figures for more time. (default: default)"),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Comma-separated. (default: 0)")] = None,
    weights: Annotated[
        str | None, typer.Option(help="auto, timm, random or a checkpoint file. (default: auto)")
    ] = None,
    limit_train: Annotated[
        int | None, typer.Option(min=1, help="Use this many training images, of every class some.")
    ] = None,
    limit_val: Annotated[
        int | None, typer.Option(min=1, help="Use this many validation images, of every class some.")
    ] = None,
    eval_size: Annotated[
        str | None, typer.Option(help="Metrics at network size, or at the labels' original size. (default: network)")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Read all files first and do without unreadable images.")
    ] = False,
    shuffle_labels: Annotated[
        bool, typer.Option("--shuffle-labels", help="A control: train on other images' labels. Nothing must be gained.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    cudnn_benchmark: Annotated[
        bool, typer.Option("--cudnn-benchmark", help="Let cuDNN try out its convolution algorithms.")
    ] = False,
    shared_gpu: Annotated[
        bool, typer.Option("--shared-gpu", help="Measure although another process is on the GPU; records say so.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Loader processes. (default: none on a CPU, up to 8 on a GPU)")
    ] = None,
    cache: Annotated[
        str, typer.Option(help="none, ram or disk: keep decoded and resized images and labels; changes no figure.")
    ] = "none",
    keep_weights: Annotated[
        bool, typer.Option("--keep-weights/--no-keep-weights", help="What was trained, beside each record.")
    ] = True,
    probe_gradients: Annotated[
        int, typer.Option(min=0, help="So many times in all, compare the tasks' gradients (for `bench figure`).")
    ] = 0,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate/--no-estimate",
            help="Predict each cell's memory too, seconds a cell; `bench estimate --records` can add it later.",
        ),
    ] = True,
    out: Annotated[Path, typer.Option(help="Where records go.")] = Path("runs"),
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="Run finished cells again too, and interrupted ones of other code from the start."
        ),
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed cells again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read the data, print the cells and stop.")] = False,
) -> None:
    """Train, measure and evaluate; one record a cell. What has been done already is not done again."""
    from bench import grid, sweep

    console = Console()
    given = {
        "methods": methods, "backbone": backbone, "dataset": dataset, "tasks": tasks, "protocol": protocol,
        "decoder": decoder, "recipe": recipe, "image_size": image_size, "batch_size": batch_size, "epochs": epochs,
        "steps": steps, "precision": precision, "memory": memory, "seeds": seeds, "weights": weights,
        "limit_train": limit_train, "limit_val": limit_val, "eval_size": eval_size,
    }  # fmt: skip
    flags = {"skip_bad": skip_bad, "cudnn_benchmark": cudnn_benchmark, "shuffle_labels": shuffle_labels}
    chosen = {k: v for k, v in (given | flags).items() if v is not None and v is not False}
    jobs = grid.jobs(
        suite,
        chosen,
        data_root,
        device,
        workers,
        out,
        errors.print,
        cache,
        shared_gpu=shared_gpu or dry_run,
        keep_weights=keep_weights,
        probes=probe_gradients,
        estimate=estimate,
    )
    if other := sweep.on_other_data(jobs):
        errors.print(other)
    if dry_run:
        _print_cells(jobs, console)
        return
    sweep.check_writable(out)
    random = any(job.spec.weights == "random" for job in jobs)
    if random:
        _warn_random(console)
    results = sweep.run_all(jobs, console, retry, fresh)
    bad = [result for result in results if result.status != "ok"]
    if random:
        _warn_random(console)
    folder = "" if out == Path("runs") else f" {out}"
    console.print(f"{len(results) - len(bad)} of {len(results)} cells ok; `bench report{folder}` prints the tables")
    traced = next((result for result in bad if result.failure and result.failure.traceback), None)
    if traced:
        console.print(f"`bench show {traced.path(out).stem}{folder}` shows where the first of them failed")
    if bad:
        raise typer.Exit(1)


@app.command()
@one_line_errors
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of records.")] = Path("runs"),
    reference: Annotated[
        str | None, typer.Option(help="Delta-m against this method, not the single-task baseline.")
    ] = None,
    table: Annotated[
        str | None,
        typer.Option(help="A paper's table, bdta/1 to 5 or vmt/1 to 3: measured beside printed."),
    ] = None,
    mix: Annotated[
        bool, typer.Option("--mix", help="Put records of different settings into one table; each row says which.")
    ] = False,
    any_device: Annotated[
        bool, typer.Option("--any-device", help="Accuracy alone, of all devices in one table.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the tables as JSON and nothing else.")] = False,
    html: Annotated[
        bool, typer.Option("--html", help="One page instead, report.html: sortable table, plot, cards; no network.")
    ] = False,
    gallery: Annotated[
        list[Path] | None, typer.Option(help="For --html: a picture to show, e.g. of `bench figure predictions`.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Where to write markdown, LaTeX, JSON and CSV. (default: FOLDER/report)")
    ] = None,
) -> None:
    """Tables 1 and 2 from records, beside the published figures; also as markdown, LaTeX, JSON and CSV."""
    from bench.report import papers, render

    if table and (mix or html or reference or any_device):
        raise BenchError("--table is a paper's own: leave --reference, --mix, --any-device and --html out")
    if any_device and (mix or html):
        raise BenchError("--any-device is for the tables of one setting: leave --mix and --html out")
    if html and mix:
        raise BenchError("--html has the rows of all settings in one table anyway: leave --mix out")
    if html and json:
        raise BenchError("--html writes a page and --json prints the tables: ask for one of them at a time")
    if gallery and not html:
        raise BenchError("--gallery goes with --html")
    if table:
        papers.report(table, folder, save, Console(), json)
        return
    out = save or folder / ("report-any-device" if any_device else "report")
    if html:
        render.page(folder, out, reference, gallery or [], Console())
        return
    render.report(folder, out, reference, Console(quiet=True) if json else Console(), mix, any_device)
    if json:
        print((out / REPORT).read_text(encoding="utf-8"), end="")


@app.command()
@one_line_errors
def compare(
    a: Annotated[Path, typer.Argument(help="Folder of records: how it was.")],
    b: Annotated[Path, typer.Argument(help="Folder of records: how it is.")],
    memory: Annotated[float, typer.Option(min=0, help="Growth in percent that counts.")] = 2,
    time: Annotated[float, typer.Option(min=0, help="Slowdown in percent that counts.")] = 10,
    metric: Annotated[float, typer.Option(min=0, help="Change of a metric in percent that counts.")] = 2,
    everything: Annotated[bool, typer.Option("--all", help="What stays the same too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Every figure as JSON.")] = False,
) -> None:
    """Two folders of records, cell by cell. Exit code 1 where B is worse, lacks a cell, or a record is unreadable."""
    from bench.report import compare

    found = compare.changes(a, b, compare.Thresholds(memory / 100, time / 100, metric / 100))
    if json:
        print(compare.as_json(found))
    else:
        compare.show(found, everything, Console())
    if any(change.verdict in compare.BAD for change in found):
        raise typer.Exit(1)


@app.command()
@one_line_errors
def audit(
    everything: Annotated[bool, typer.Option("--all", help="What agrees too.")] = False,
    counts: Annotated[
        bool, typer.Option("--counts/--no-counts", help="Hold #TP to our own counts too (half a minute).")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Every check as JSON.")] = False,
) -> None:
    """Recompute what the papers print, and print each disagreement with both values."""
    from bench.report import audit
    from bench.verbs import count as counting

    with Console(stderr=True).status("reading") as status:
        pairs, count = [], None
        if counts:
            pairs, count = counting.of_published_rows(lambda what: status.update(f"counting {escape(what)}"))
        found = audit.findings(count) + (audit.own_counts(pairs, count) if count else [])
    if json:
        print(audit.as_json(found))
    else:
        audit.show(found, everything, Console())


@app.command()
@one_line_errors
def show(
    record: Annotated[str, typer.Argument(help="A record's path, or the first digits of its hash.")],
    folder: Annotated[Path, typer.Argument(help="Where to look for a hash.")] = Path("runs"),
) -> None:
    """One record in full."""
    from bench.report import show

    show.show(record, folder, Console())


@app.command()
@one_line_errors
def count(
    methods: Annotated[str, typer.Option(help="Expressions and grids as for `run`, or 'all'.")] = "all",
    backbone: Annotated[str, typer.Option(help="Short or timm names, comma-separated.")] = "swin_tiny",
    dataset: Annotated[str, typer.Option(help="A card's name or path: its tasks are counted.")] = "scenes",
    tasks: Annotated[str | None, typer.Option(help="Comma-separated subset of the card's tasks.")] = None,
    decoder: DECODER = None,
    image_size: Annotated[str, typer.Option(help="448, or HEIGHTxWIDTH.")] = "448",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a markdown table.")] = False,
) -> None:
    """Trainable parameters under both protocols and backbone passes, in seconds: no data, weights or GPU."""
    from bench import options
    from bench.verbs import count
    from methods.choices import DecoderName

    if decoder is not None:
        options.one_of("decoder", decoder, get_args(DecoderName))
    size = options.image_size(image_size)
    table = count.counts(methods, backbone, dataset, tasks, size, errors.print, decoder)
    if markdown:
        print(count.markdown(table))
    else:
        count.show(table, Console(), decoder)


@app.command()
@one_line_errors
def estimate(
    context: typer.Context,
    methods: Annotated[str, typer.Option(help="Expressions and grids as for `run`, or 'all'.")] = "all",
    backbone: Annotated[str, typer.Option(help="Short or timm names, comma-separated.")] = "swin_tiny",
    dataset: Annotated[str, typer.Option(help="A card's name or path: its tasks are estimated.")] = "scenes",
    tasks: Annotated[str | None, typer.Option(help="Comma-separated subset of the card's tasks.")] = None,
    task_counts: Annotated[
        str | None, typer.Option(help="e.g. 1,2,4: with the first so many of the card's tasks each.")
    ] = None,
    protocol: Annotated[str, typer.Option(help="published or equal.")] = "published",
    decoder: DECODER = None,
    recipe: Annotated[str, typer.Option(help="For optimizer and clipping.")] = "bdta",
    image_size: Annotated[str, typer.Option(help="448, or HEIGHTxWIDTH; several, comma-separated.")] = "448",
    batch_size: Annotated[str, typer.Option(help="One, or several, comma-separated.")] = "8",
    precision: Annotated[str, typer.Option(help="fp32, tf32, bf16 or fp16.")] = "fp32",
    memory: Annotated[str, typer.Option(help="default, low, or both: 'default,low'.")] = "default",
    losses_together: Annotated[
        bool, typer.Option("--losses-together", help="The plain training step: all full-resolution logits at once.")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option(help="e.g. 24GB: which methods fit, and the largest batch of each (slower).")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a markdown table.")] = False,
    save: Annotated[Path | None, typer.Option(help="A CSV file for the figures, in bytes and operations.")] = None,
    records: Annotated[
        Path | None,
        typer.Option(help="Instead: add the estimate to the records of this folder that were made without one."),
    ] = None,
) -> None:
    """Memory of a training step on a CUDA GPU and its operations, predicted: no GPU, data or weights."""
    from bench.verbs import estimate

    given = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]
    if records:
        others = [name.replace("_", "-") for name in given if name not in ("records", "dataset")]
        if others:
            raise BenchError(f"--records takes every setting from the records: leave --{others[0]} out")
        filled = estimate.fill(
            records, dataset if "dataset" in given else None, lambda line: errors.print(escape(line))
        )
        Console().print(f"{filled} {'record' if filled == 1 else 'records'} filled in")
        return
    table = estimate.table(
        methods, backbone, dataset=dataset, tasks=tasks, task_counts=task_counts, image_sizes=image_size,
        batch_sizes=batch_size, memory=memory, losses_together=losses_together, gpu=gpu, tell=errors.print,
        protocol=protocol, decoder=decoder, recipe=recipe, precision=precision,
    )  # fmt: skip
    if save:
        write_atomically(save, table.to_csv(index=False))
    if markdown:
        print(estimate.markdown(table))
    else:
        estimate.show(table, Console())
    if estimate.REASON in table:
        raise typer.Exit(1)


@app.command()
@one_line_errors
def profile(
    methods: Annotated[str, typer.Option(help="Expressions and grids as for `run`.")],
    backbone: Annotated[str, typer.Option(help="A short or timm name.")] = "swin_tiny",
    dataset: Annotated[str, typer.Option(help="A card's name or path: its tasks are trained.")] = "scenes",
    tasks: Annotated[str | None, typer.Option(help="Comma-separated subset of the card's tasks.")] = None,
    protocol: Annotated[str, typer.Option(help="published or equal.")] = "published",
    decoder: DECODER = None,
    recipe: Annotated[str, typer.Option(help="For optimizer and clipping.")] = "bdta",
    image_size: Annotated[str, typer.Option(help="448, or HEIGHTxWIDTH.")] = "448",
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    precision: Annotated[str, typer.Option(help="fp32, tf32, bf16 or fp16.")] = "fp32",
    memory: Annotated[str, typer.Option(help="default, or low: activation checkpointing.")] = "default",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    shared_gpu: Annotated[bool, typer.Option("--shared-gpu", help="Although another process is on the GPU.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each method that count.")] = 9,
    reference: Annotated[str | None, typer.Option(help="Ratios against this method. (default: the first)")] = None,
    operators: Annotated[
        int, typer.Option(min=0, help="Also so many operators of each method: what a step's time goes to.")
    ] = 0,
    find_max_batch: Annotated[
        bool, typer.Option("--find-max-batch", help="Instead: the largest batch of each that trains, found by trying.")
    ] = False,
    memory_limit: Annotated[
        str | None, typer.Option(help="For --find-max-batch, e.g. 24GB: as on a smaller GPU; needed on a CPU.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="A CSV file for the figures.")] = None,
) -> None:
    """Seconds a batch of several methods side by side, their steps interleaved, and the ratios between them."""
    from bench import options
    from bench import step as steps
    from bench.device import resolve_device
    from bench.measure import gpu_state
    from bench.verbs import max_batch
    from bench.verbs import profile as profiles

    console = Console()
    asked = steps.asked(
        backbone=backbone, dataset=dataset, tasks=tasks, protocol=protocol, decoder=decoder, recipe=recipe,
        image_size=image_size, precision=precision, memory=memory,
    )  # fmt: skip
    place = resolve_device(device, precision)
    if place.uuid and not shared_gpu:
        gpu_state.refuse_company(place.uuid, place.name)
    if memory_limit and not find_max_batch:
        raise BenchError("--memory-limit goes with --find-max-batch")
    if operators and find_max_batch:
        raise BenchError("--operators and --find-max-batch are two questions: ask for one of them at a time")
    if find_max_batch:
        limit = options.memory_size("memory-limit", memory_limit) if memory_limit else None
        found = max_batch.table(methods, asked, place, limit, Console(stderr=True))
        if save:
            write_atomically(save, found.to_csv(index=False))
        max_batch.show(found, profiles.heading(asked, None, place), place, limit, console)
        return
    failed: list[str] = []

    def leave_out(line: str) -> None:
        failed.append(line)
        errors.print(escape(line))

    found = profiles.profile(methods, asked, batch_size, place, rounds, Console(stderr=True), operators > 0, leave_out)
    table = profiles.figures(found, reference)
    if save:
        write_atomically(save, table.to_csv(index=False))
    profiles.show(table, profiles.heading(asked, batch_size, place), rounds, console)
    if operators:
        profiles.show_operators(found, operators, bool(place.name), console)
    if failed:
        raise typer.Exit(1)


@app.command()
@one_line_errors
def figure(
    name: Annotated[
        str,
        typer.Argument(
            help="pareto, memory, sweep, ablation, gradients, similarity, curves; of trained models: predictions, "
            "features, gates."
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="Folder of records.")] = Path("runs"),
    record: Annotated[
        list[str] | None, typer.Option(help="Of a trained model, by path or first digits; several for predictions.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="Delta-m against this method.")] = None,
    option: Annotated[str | None, typer.Option(help="For sweep: this option alone, e.g. r.")] = None,
    published: Annotated[bool, typer.Option("--published", help="For pareto: the papers' figures, marked.")] = False,
    any_device: Annotated[
        bool,
        typer.Option("--any-device", help="For pareto: records of all devices in one figure, without costs of one."),
    ] = False,
    weights: Annotated[Path | None, typer.Option(help="The backbone's checkpoint, where it came from a file.")] = None,
    dataset: Annotated[str | None, typer.Option(help="The card, where the record's is a file of your own.")] = None,
    data_root: Annotated[Path | None, typer.Option(help="Folder that the card's files lie in.")] = None,
    images: Annotated[
        int | None, typer.Option(min=1, max=16, help="For predictions and features: so many. (default: 2)")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where PNG and SVG go.")] = Path("figures"),
) -> None:
    """A figure from records, or from trained models and their validation images, as PNG and SVG."""
    from bench.figures import draw
    from bench.figures.from_records import Choice

    choice = Choice(reference, option, published, any_device)
    draw.figure(name, folder, record or [], weights, dataset, data_root, images, choice, out, Console())


RECORD = Annotated[str, typer.Option(help="A record's path, or the first digits of its hash.")]
BACKBONE_WEIGHTS = Annotated[
    Path | None, typer.Option(help="The backbone's checkpoint, where the record's weights came from a file.")
]
RECORD_CARD = Annotated[str | None, typer.Option(help="The card, where the record's is a file of your own.")]


@app.command()
@one_line_errors
def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    record: RECORD,
    folder: Annotated[Path, typer.Option("--folder", help="Where to look for a hash.")] = Path("runs"),
    weights: BACKBONE_WEIGHTS = None,
    dataset: RECORD_CARD = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Where pictures and arrays go. (default: predictions/HASH-sSEED)")
    ] = None,
) -> None:
    """Every task's prediction for images, in colours and as arrays, from a trained cell."""
    from bench.device import resolve_device
    from bench.verbs import trained

    place = resolve_device(device, "fp32")
    cell = trained.load(record, folder, weights, dataset)

    import torch

    from bench.verbs import predict

    out = out or Path("predictions", cell.path.stem)
    predict.run(cell, images, out, torch.device(f"cuda:{place.index}" if place.name else "cpu"), Console())


@app.command()
@one_line_errors
def evaluate(
    record: RECORD,
    folder: Annotated[Path, typer.Option("--folder", help="Where to look for a hash.")] = Path("runs"),
    weights: BACKBONE_WEIGHTS = None,
    dataset: RECORD_CARD = None,
    data_root: Annotated[Path | None, typer.Option(help="Folder that the card's files lie in.")] = None,
    eval_size: Annotated[
        str | None, typer.Option(help="network, or original: at the labels' own size. (default: the record's)")
    ] = None,
    limit_val: Annotated[
        int | None, typer.Option(min=1, help="At most so many images. (default: the record's)")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="(default: the record's)")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load images and score edges.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
) -> None:
    """A trained cell's metrics on its validation images again: elsewhere, by today's code, or at original size."""
    from bench import options
    from bench.device import resolve_device
    from bench.spec import EvalSize
    from bench.verbs import trained

    if eval_size is not None:
        options.one_of("eval-size", eval_size, get_args(EvalSize))
    if out is not None and out.exists():
        raise BenchError(f"--out {out} is there already: nothing is overwritten; name a new file")
    place = resolve_device(device, "fp32")
    cell = trained.load(record, folder, weights, dataset)

    from bench.verbs import evaluate

    console = Console()
    scores = evaluate.score(cell, data_root, place, eval_size, limit_val, batch_size, workers, console)
    evaluate.write(cell, scores, place, out, console)


@app.command()
@one_line_errors
def export(
    record: RECORD,
    folder: Annotated[Path, typer.Option("--folder", help="Where to look for a hash.")] = Path("runs"),
    weights: BACKBONE_WEIGHTS = None,
    dataset: RECORD_CARD = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Check on this image, several times. (default: rendered scenes)")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("export"),
) -> None:
    """A trained cell for others: trained weights with a model card, and the whole model by torch.export, checked."""
    from bench.verbs import trained

    cell = trained.load(record, folder, weights, dataset)

    from bench.verbs import export

    export.export(cell, out, image or [], Console())


@app.command("list")
@one_line_errors
def list_(
    what: Annotated[str, typer.Argument(help="methods, backbones, datasets, recipes or suites; or a method's name")],
) -> None:
    """What can be asked for by name; of a method, what it does and what its options mean."""
    from bench.verbs import listing

    if text := listing.about(what):
        print(text)
    else:
        Console().print(listing.table(what))


def _print_cells(jobs: list, console: Console) -> None:
    """What all cells share on a line, what sets them apart in a table."""
    from bench import sweep

    rows = []
    for job in jobs:
        spec, known = job.spec, sweep.finished(job)
        state = "begun" if job.checkpoint_path.is_file() else "new"
        if known:
            state = known.status.replace("_", " ") + (", by other code" if sweep.other_code(known) else "")
        rows.append(
            {
                "method": spec.method,
                "backbone": spec.backbone,
                "dataset": spec.dataset,
                "tasks": ", ".join(spec.tasks),
                "protocol": spec.protocol,
                "decoder": spec.decoder or "the protocol's",
                "recipe": spec.recipe_name,
                "learning rate": spec.recipe.rates,
                "size": "x".join(map(str, spec.image_size)),
                "batch": str(spec.batch_size),
                "length": f"{spec.epochs} epochs" if spec.epochs else f"{spec.steps} steps",
                "precision": spec.precision,
                "memory": spec.memory,
                "weights": spec.weights[:13],
                "device": spec.device,
                "seed": str(spec.seed),
                "hash": spec.hash,
                "state": state,
            }
        )
    always = ("method", "seed", "hash", "state")
    shown = [key for key in rows[0] if key in always or len({row[key] for row in rows}) > 1]
    shared = ", ".join(f"{key} {value}" for key, value in rows[0].items() if key not in shown)
    console.print(f"{len(rows)} {'cell' if len(rows) == 1 else 'cells'}; {escape(shared)}")
    table = Table()
    for key in shown:
        table.add_column(key, overflow="fold")
    for row in rows:
        table.add_row(*(escape(row[key]) for key in shown))
    console.print(table)


def _warn_random(console: Console) -> None:
    console.print(
        "[bold white on red] RANDOM BACKBONE WEIGHTS [/] accuracy from a random frozen backbone means little; "
        "parameters, memory and time still hold. Pretrained ones: --weights timm or --weights PATH"
    )
