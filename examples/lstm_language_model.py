"""A word-level LSTM language model, trained as always; `dropfx.compile(model)` is the only line that is new.

python examples/lstm_language_model.py [--text FILE | --brown DIR] [--size N] [--dropout-impl bernoulli|dropfx|none]

The text is the King James Bible where Debian's package bible-kjv is installed. The medium and the large model of
Zaremba, Sutskever and Vinyals (arXiv 1409.2329), to whose learning rates and clipping the loss is scaled:

    --size 650 --p .5 --epochs 39 --flat-epochs 6 --decay 1.2
    --size 1500 --p .65 --epochs 55 --flat-epochs 14 --decay 1.15 --clip 10

With --checkpoint FILE a run that was stopped goes on with --resume, exactly as if it had not been stopped.
"""

import argparse
import math
import os
import time

import rich.progress
import texts
import torch
from torch import nn

import dropfx


class LanguageModel(nn.Module):
    def __init__(self, words, size, p):
        super().__init__()
        self.embedding = nn.Embedding(words, size)
        self.drop = nn.Dropout(p)
        self.lstm = nn.LSTM(size, size, num_layers=2, dropout=p)
        self.decoder = nn.Linear(size, words)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, words, state):
        """Logits [steps, batch, vocabulary] of the next words, from words [steps, batch] and the state before."""
        hidden, state = self.lstm(self.drop(self.embedding(words)), state)
        return self.decoder(self.drop(hidden)), state

    def initial_state(self, batch):
        zeros = self.decoder.weight.new_zeros(2, batch, self.lstm.hidden_size)
        return zeros, zeros


def columns(text, batch, device):
    """The text as columns that are read side by side: [length, batch]."""
    length = len(text) // batch
    if length < 2:
        raise ValueError(f"a part of the text has {len(text)} words, too few for --batch {batch}")
    return text[: length * batch].view(batch, length).t().contiguous().to(device)


def window(text, start, steps):
    """`steps` rows of the text from `start` on, and the words that follow each; fewer at the end."""
    end = min(start + steps, len(text) - 1)
    return text[start:end], text[start + 1 : end + 1]


def cross_entropy(logits, targets):
    """Summed over all words."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def train_step(model, optimizer, words, targets, state, clip):
    """Returns the summed loss and the state for the next window, cut off from this one's graph."""
    logits, state = model(words, state)
    loss = cross_entropy(logits, targets)
    optimizer.zero_grad()
    (loss / words.shape[1]).backward()  # the sum over the steps, the mean over the columns
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.item(), tuple(part.detach() for part in state)


@torch.no_grad()
def perplexity(model, text, steps):
    """exp of the mean cross-entropy of a text [length, columns], without dropout."""
    model.eval()
    state, loss = model.initial_state(text.shape[1]), 0.0
    for start in range(0, len(text) - 1, steps):
        words, targets = window(text, start, steps)
        logits, state = model(words, state)
        loss += cross_entropy(logits, targets).item()
    model.train()
    return math.exp(loss / text[1:].numel())


class Training:
    """A model, its optimizer and schedule, and how far they are: all that a checkpoint holds."""

    def __init__(self, model, args):
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda epoch: args.decay ** -max(0, epoch + 1 - args.flat_epochs)
        )
        self.settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
        self.steps_done = 0
        self.start_epoch(0)

    def start_epoch(self, epoch):
        self.epoch, self.position, self.loss, self.seconds = epoch, 0, 0.0, 0.0
        self.state = self.model.initial_state(self.settings["batch"])

    def save(self, path):
        parts = {name: getattr(self, name).state_dict() for name in PARTS}
        here = {name: getattr(self, name) for name in ("settings", "state", *PLACE)}
        random = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
        torch.save({**parts, **here, "random": random}, f"{path}.new")
        os.replace(f"{path}.new", path)  # a run that dies while it saves keeps the checkpoint before

    def load(self, path):
        """Go on where the run of a checkpoint stopped, in the same state of all that is random."""
        saved = read_checkpoint(path, self.settings)
        for name in PARTS:
            getattr(self, name).load_state_dict(saved[name])
        for name in PLACE:
            setattr(self, name, saved[name])
        self.state = tuple(part.to(self.settings["device"]) for part in saved["state"])
        torch.set_rng_state(saved["random"]["cpu"])
        torch.cuda.set_rng_state_all(saved["random"]["cuda"])


PARTS = ("model", "optimizer", "schedule")
PLACE = ("steps_done", "epoch", "position", "loss", "seconds")
MAY_CHANGE = ("epochs", "checkpoint", "resume", "save_every", "stop_after")


def read_checkpoint(path, settings):
    """The content of a checkpoint that was made with the same settings."""
    try:
        saved = torch.load(path, map_location="cpu")
        made_with = saved["settings"]
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(f"--resume: {path} is no checkpoint: {str(error).splitlines()[0]}") from error
    for name, value in settings.items():
        if made_with.get(name) != value:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option}: got {value}, but {path} was made with {made_with.get(name)}")
    return saved


def train_epoch(run, text, args, show):
    """Goes on with the epoch to its end, or to --stop-after."""
    while run.position < len(text) - 1 and run.steps_done < args.stop_after:
        start = time.perf_counter()
        words, targets = window(text, run.position, args.steps)
        loss, run.state = train_step(run.model, run.optimizer, words, targets, run.state, args.clip)
        run.loss += loss
        run.position += len(words)
        run.steps_done += 1
        run.seconds += time.perf_counter() - start
        show(run)
        if args.checkpoint and run.steps_done % args.save_every == 0:
            run.save(args.checkpoint)


def finish_epoch(run, valid_text, test_text, args):
    """Moves on to the next epoch. Returns a line about this one."""
    line = (
        f"epoch {run.epoch + 1}: lr {run.schedule.get_last_lr()[0]:.3g}, train perplexity {trained(run):.2f}, "
        f"valid {perplexity(run.model, valid_text, args.steps):.2f}, "
        f"test {perplexity(run.model, test_text, args.steps):.2f}, {run.seconds:.1f} s"
    )
    run.schedule.step()
    run.start_epoch(run.epoch + 1)
    return line


def trained(run):
    """Perplexity of the epoch so far, with dropout."""
    return math.exp(run.loss / (run.position * run.settings["batch"]))


def train(run, text, valid_text, test_text, args):
    """Train to the last epoch, with a line for each and a checkpoint where one is asked for."""
    fields = "{task.description}", rich.progress.BarColumn(), rich.progress.TimeRemainingColumn(), "{task.fields[now]}"
    run.model.train()
    with rich.progress.Progress(*fields) as bar:
        task = bar.add_task("", total=args.epochs * math.ceil((len(text) - 1) / args.steps), now="")

        def show(run):
            description, now = f"epoch {run.epoch + 1}/{args.epochs}", f"train perplexity {trained(run):.1f}"
            bar.update(task, completed=run.steps_done, description=description, now=now)

        while run.epoch < args.epochs and run.steps_done < args.stop_after:
            train_epoch(run, text, args, show)
            if run.position == len(text) - 1:
                bar.console.print(finish_epoch(run, valid_text, test_text, args), highlight=False)
            if args.checkpoint:
                run.save(args.checkpoint)


def positive(number):
    """What argparse calls for an option: a number above 0 of the kind of `number`."""

    def convert(text):
        try:
            value = type(number)(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"got {text!r}, accepted is {type(number).__name__} above 0")
        return value

    return {"type": convert, "default": number, "metavar": "N", "help": f"(default: {number})"}


def parse():
    """The parser, for its error messages, and the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="a text file, one sentence per line")
    source.add_argument("--brown", metavar="DIR", help="folder of the Brown corpus, files named ca01 to cr09")
    parser.add_argument("--vocabulary", **positive(10_000))
    parser.add_argument("--size", **positive(200))
    parser.add_argument("--p", type=float, default=0.5, help="drop rate (default: .5)")
    parser.add_argument("--dropout-impl", choices=("bernoulli", "dropfx", "none"), default="dropfx")
    parser.add_argument("--pattern", default="block", help="block, slice, row or tile (default: block)")
    parser.add_argument("--groups", default="auto", help="draws per batch, time, or auto (default: auto)")
    parser.add_argument("--batch", **positive(20))
    parser.add_argument("--steps", **positive(35))
    parser.add_argument("--epochs", **positive(13))
    parser.add_argument("--lr", **positive(1.0))
    parser.add_argument("--flat-epochs", **positive(4))
    parser.add_argument("--decay", **positive(2.0))
    parser.add_argument("--clip", **positive(5.0))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpoint", metavar="FILE", help="save there, every --save-every steps and every epoch")
    parser.add_argument("--save-every", **positive(500))
    parser.add_argument("--stop-after", type=int, default=math.inf, metavar="N", help="training steps in all")
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    args = parser.parse_args()
    if args.resume and not args.checkpoint:
        parser.error("--resume: needs --checkpoint FILE")
    if args.checkpoint and not args.resume and os.path.exists(args.checkpoint):
        parser.error(f"--checkpoint: {args.checkpoint} is there already; go on from it with --resume, or name another")
    return parser, args


def set_up(args):
    """The run, new or resumed, and the texts as columns for training, validation and testing."""
    *parts, words = texts.load(args.text, args.brown, args.vocabulary)
    torch.manual_seed(args.seed)
    model = LanguageModel(len(words), args.size, 0.0 if args.dropout_impl == "none" else args.p).to(args.device)
    if args.dropout_impl == "dropfx":
        groups = int(args.groups) if args.groups.isdigit() else args.groups
        dropfx.compile(model, pattern=args.pattern, groups=groups)
    run = Training(model, args)
    if args.resume:
        run.load(args.checkpoint)
    elif args.checkpoint:
        run.save(args.checkpoint)  # better to fail now than after hours
    return run, *(columns(part, args.batch, args.device) for part in parts)


def main():
    """Train from the start or from a checkpoint."""
    parser, args = parse()
    try:
        run, *parts = set_up(args)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    try:
        train(run, *parts, args)
    except KeyboardInterrupt:
        parser.exit(130, "stopped; --resume goes on from the last checkpoint\n" if args.checkpoint else "stopped\n")


if __name__ == "__main__":
    main()
