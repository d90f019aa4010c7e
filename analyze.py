"""Look inside a model: ``python analyze.py --checkpoint PATH --text "The cat sat on the mat. It was fluffy."``

PATH is a checkpoint of train.py, or the folder of a Hugging Face model (decoder, encoder or encoder-decoder). Pictures
go to a folder and tables to the terminal; with --json, everything is printed as JSON instead.
"""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress, track

from attention_monitor import AttentionMaps, AttentionMonitorError
from attention_monitor.analysis import rank_heads, weight_shift
from attention_monitor.naming import head_name
from attention_monitor.plots.fonts import missing_glyphs
from attention_monitor.statistics.catalogue import resolve_statistics
from gpt import InputError
from inspection.pictures import Picture, animation, difference_pictures, pictures
from inspection.report import Comparison, ModelReading, Selection, as_json, compare, look, tell, tell_comparison
from inspection.subject import Subject
from inspection.subjects import checkpoints_in, load_subject, untrained_subject

MATRICES = ("entropy", "max_weight", "mean_distance")
SHOWN = 12  # windows that --show-plots opens at most
DPI = 100
FOLDER = Path("attention_plots")


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "analyze.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_argument_group(
        "model (without a checkpoint, an untrained GPT with random weights that reads bytes)"
    )
    model.add_argument("--checkpoint", metavar="PATH", help="of train.py, or the folder of a Hugging Face model")
    model.add_argument("--config", metavar="YAML", help="untrained: the model of a config of train.py")
    model.add_argument("--n-layer", type=int, help="untrained: layers (default: the config's, or 4)")
    model.add_argument("--n-head", type=int, help="untrained: heads of a layer (default: the config's, or 4)")
    model.add_argument("--n-embd", type=int, help="untrained: width (default: the config's, or 128)")
    model.add_argument("--device", default="cpu", help="such as cuda (default: %(default)s)")
    text = parser.add_argument_group("text (of one that is longer than the model's context, the last part is read)")
    given = text.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", help="what the model reads")
    given.add_argument("--file", metavar="PATH", help="a text file in UTF-8; - is standard input")
    text.add_argument("--target", help="what the decoder of an encoder-decoder reads (default: the text too)")
    which = parser.add_argument_group("what to look at")
    which.add_argument("--layer", type=int, help="this layer alone (default: all, and pictures over layers)")
    which.add_argument("--head", type=int, help="this head alone, in each layer")
    which.add_argument(
        "--max-heads", type=int, default=16, help="heads of a layer that are drawn (default: %(default)s)"
    )
    which.add_argument("--top-k", type=int, default=5, help="attended tokens that are listed (default: %(default)s)")
    which.add_argument("--statistics", nargs="+", default=MATRICES, metavar="NAME",
                       help=f"matrices of layers and heads to draw (default: {' '.join(MATRICES)})")  # fmt: skip
    several = parser.add_argument_group("several models")
    several.add_argument(
        "--compare", metavar="OTHER", help="another model of the same shape: what changed from PATH to it"
    )
    several.add_argument("--animate", metavar="DIR",
                         help="checkpoints of one run: a GIF of the head that --layer and --head name, or else of the "
                              "one that changes most from first to last")  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument("--output-dir", type=Path, help=f"for pictures (default: {FOLDER})")
    output.add_argument("--shared-scale", action="store_true",
                        help="the brightest colour is the largest weight in a picture, not 1")  # fmt: skip
    output.add_argument("--show-plots", action="store_true", help="open the pictures in windows too")
    output.add_argument("--json", action="store_true",
                        help="print everything as JSON; draws nothing unless --output-dir is given")  # fmt: skip
    options = parser.parse_args(args)

    def given(*names: str) -> str | None:
        """The first of these options that has been given."""
        return next((f"--{n.replace('_', '-')}" for n in names if getattr(options, n) not in (None, False)), None)

    if (options.checkpoint or options.animate) and (name := given("config", "n_layer", "n_head", "n_embd")):
        parser.error(f"{name} is for an untrained model; leave it out where there are checkpoints")
    if options.compare and not options.checkpoint:
        parser.error("--compare needs a --checkpoint to compare with")
    if options.animate and (name := given("checkpoint", "compare", "target", "json", "show_plots")):
        parser.error(f"--animate makes a GIF and nothing else; leave {name} out")
    for name in ("max_heads", "top_k"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(options, name)}")
    return options


def main(args: Sequence[str] | None = None) -> None:
    """Look at what the command line says."""
    options = parse(args)
    text = options.text if options.file is None else read_text(options.file)
    options.statistics = [stat.name for stat in resolve_statistics(list(options.statistics))]
    messages = Console(stderr=True)  # what goes to stdout may be JSON
    if not options.json:
        options.output_dir = options.output_dir or FOLDER
    if options.animate is not None:
        animate(options, text, messages)
        return
    found = look(load_or_make(options), text, options.target, options.statistics)
    selection = select(found.maps, options.layer, options.head)
    comparison = None
    if options.compare is not None:
        other = load_subject(options.compare, options.device)
        comparison = compare(found, look(other, text, options.target, options.statistics))
    if options.output_dir is not None:
        make_folder(options.output_dir)  # before there is anything to read
    if options.json:
        print(json.dumps(as_json(found, selection, options.top_k, comparison), allow_nan=False))
    else:
        console = Console()
        if not console.is_terminal:
            console.width = 160
        tell(console, found, selection, options.top_k, of_heads=options.head is not None)
        if comparison is not None:
            tell_comparison(console, comparison)
    if options.output_dir is not None:
        draw(options, found, selection, comparison, messages)


def draw(
    options: argparse.Namespace,
    found: ModelReading,
    selection: Selection,
    comparison: Comparison | None,
    messages: Console,
) -> None:
    """Write the pictures."""
    most = max(len(heads) for _, heads in selection)
    selection = [(layer, heads[: options.max_heads]) for layer, heads in selection]
    whole, of_layers = options.head is None, options.head is None and options.layer is None
    todo = pictures(found, selection, options.statistics, brightest(options), whole, of_layers)
    if comparison is not None:
        todo += difference_pictures(comparison, selection)
    if missing := missing_glyphs([*(found.maps.tokens or ()), *(found.maps.target_tokens or ())]):
        say(messages, f"No installed font has {missing[:20]!r}: drawn as ▯ (fonts such as Noto Sans CJK have more).")
    if most > options.max_heads:
        say(messages, f"{options.max_heads} heads of a layer are drawn; --max-heads {most} draws all.")
    files = save(todo, options.output_dir, messages)
    what = "1 picture is" if len(todo) == 1 else f"{len(todo)} pictures are"
    say(messages, f"{what} in {options.output_dir}")
    if options.show_plots:
        show(files, messages)


def brightest(options: argparse.Namespace) -> float | None:
    """Weight with the brightest colour; None: the largest of a picture."""
    return None if options.shared_scale else 1.0


def make_folder(folder: Path) -> None:
    """Raises InputError when it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The output folder {folder} cannot be made: {error.strerror}.") from error


def read_text(path: str) -> str:
    """Of a file, or of standard input: -.

    Raises:
        InputError: when it is not there, or not UTF-8.
    """
    if path == "-" and sys.stdin is None:
        raise InputError("Standard input is closed; give the text with --text, or --file PATH.")
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8-sig").read()  # line ends as Python has them
    except UnicodeDecodeError as error:
        raise InputError(
            f"The text in {path} is not UTF-8 ({error.reason}); convert it, e.g. with iconv -t UTF-8."
        ) from error
    except OSError as error:
        raise InputError(f"The text file {path} cannot be read: {error.strerror}.") from error


def load_or_make(options: argparse.Namespace) -> Subject:
    if options.checkpoint is not None:
        return load_subject(options.checkpoint, options.device)
    shape = {name: getattr(options, name) for name in ("n_layer", "n_head", "n_embd")}
    return untrained_subject(options.config, options.device, **shape)


def select(maps: AttentionMaps, layer: int | None, head: int | None) -> Selection:
    """The layers and heads that are asked for.

    Raises:
        InputError: when there are none of that number.
    """
    if layer is not None and not 0 <= layer < len(maps):
        raise InputError(f"There is no layer {layer}: this model has layers 0 to {len(maps) - 1}.")
    selection: list[tuple[int, Sequence[int]]] = []
    for number in range(len(maps)) if layer is None else [layer]:
        n_heads = maps.n_heads(number)
        if head is not None and not 0 <= head < n_heads:
            raise InputError(f"There is no head {head}: layer {number} has heads 0 to {n_heads - 1}.")
        selection.append((number, range(n_heads) if head is None else [head]))
    return selection


def save(todo: Sequence[Picture], folder: Path, messages: Console) -> list[Path]:
    """Draw and write pictures."""
    for name, draw in track(todo, "drawing", console=messages, disable=not messages.is_terminal):
        picture = draw()
        if isinstance(picture, Figure):
            picture.savefig(folder / name, dpi=DPI)
        else:
            picture.save(folder / name)
    return [folder / name for name, _ in todo]


def show(files: Sequence[Path], messages: Console) -> None:
    """Open windows, where there is a screen, and wait until they are closed."""
    import matplotlib.pyplot as plt

    if plt.get_backend().lower() == "agg":
        say(messages, "There is no screen to show pictures on; they are in the folder.")
        return
    for file in files[:SHOWN]:
        pixels = plt.imread(file)  # (height, width, 3)
        plt.figure(file.name, figsize=(pixels.shape[1] / DPI, pixels.shape[0] / DPI), dpi=DPI).figimage(pixels)
    plt.show()


def animate(options: argparse.Namespace, text: str, messages: Console) -> None:
    """Write a GIF of one head over the checkpoints of a run."""
    maps: dict[int, AttentionMaps] = {}
    for path in track(checkpoints_in(options.animate), "reading", console=messages, disable=not messages.is_terminal):
        subject = load_subject(path, options.device)
        step = subject.step or 0
        if step in maps:  # last.ckpt is a copy of another
            continue
        found = subject.read(text, say=lambda note: say(messages, note) if not maps else None)
        try:
            weight_shift(next(iter(maps.values()), found), found)
        except AttentionMonitorError as error:
            raise InputError(f"{path} is not of the same run as those before it. {error}") from error
        maps[step] = found
    steps = sorted(maps)
    if len(steps) < 2:
        raise InputError(f"All checkpoints in {options.animate} are of step {steps[0]}; an animation takes two steps.")
    first, last = maps[steps[0]], maps[steps[-1]]
    chosen = {(layer, head) for layer, heads in select(last, options.layer, options.head) for head in heads}
    # where nothing can be said of a change, as in a text of one token, the first head
    layer, head, share = next(
        (one for one in rank_heads(weight_shift(first, last)) if one[:2] in chosen), (*min(chosen), 0.0)
    )
    frames = animation([maps[step] for step in steps], steps, layer, head, brightest(options))
    make_folder(options.output_dir)
    path = options.output_dir / f"layer_{layer}_head_{head}.gif"
    with Progress(console=messages, disable=not messages.is_terminal) as progress:
        task = progress.add_task("drawing", total=len(steps))
        frames.save(path, writer="pillow", progress_callback=lambda i, n: progress.update(task, completed=i + 1))
    of_steps = f"{len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}"
    say(messages, f"{head_name(layer, head)} over {of_steps}, in which {share:.0%} of its weight moved: {path}")


def say(messages: Console, sentence: str) -> None:
    """Print a sentence as it is: paths and texts may look like markup."""
    messages.print(sentence, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # what reads the tables has seen enough
        sys.stderr.close()
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, AttentionMonitorError, OSError) as error:
        sys.exit(f"analyze.py: error: {error}")
