"""``generate``: text from a run, as it comes."""

import argparse
import sys
from collections.abc import Callable, Iterator

import torch

from moe_pretrain.commands.options import Parser
from moe_pretrain.commands.trained_run import add_run, add_tokenizer, find_tokenizer, open_run
from moe_pretrain.config.schema import ConfigError
from moe_pretrain.data.tokenizer.tokenizer import Tokenizer
from moe_pretrain.inference.cached_decoder import check_generates
from moe_pretrain.inference.decoding import Generator, Sampling, SelfContrast
from moe_pretrain.system.gpu import device_for_inference

_DECODINGS = ("sample", "self_contrast")


def arguments(parser: Parser) -> None:
    """A run, a text, and how to go on."""
    add_run(parser)
    parser.add_argument("text", metavar="TEXT", help="the beginning of the text")
    parser.add_argument(
        "words",
        metavar="WORD",
        nargs="*",
        default=[],
        help="decode=sample (default) or decode=self_contrast; router_file=PATH: python of the run's own router",
    )
    parser.add_argument("--max-tokens", type=int, default=100, metavar="N", help="most new tokens (default: 100)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token (default: 1)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest, of mass P")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--alpha", type=float, default=0.1, help="self_contrast: share of the largest probability")
    parser.add_argument("--beta", type=float, default=0.5, help="self_contrast: strength of the contrast")
    parser.add_argument("--weak-ranks", default="2", metavar="R,R", help="self_contrast: experts of the weak pass")
    add_tokenizer(parser)
    parser.add_examples(
        "outputs/tiny-top_k 'The statement'",
        "outputs/tiny-top_k 'def f(x):' --temperature=0.8 --top-p=0.9 --seed=1 --max-tokens=200",
        "outputs/tiny-top_k 'The statement' decode=self_contrast --temperature=0",
    )


def run(options: argparse.Namespace) -> int:
    """Print the text and what the model goes on with, token by token; notes go to the standard error."""
    decoding = [word.removeprefix("decode=") for word in options.words if word.startswith("decode=")]
    options.router_files = [word for word in options.words if not word.startswith("decode=")]
    if any(one not in _DECODINGS for one in decoding):
        raise ConfigError(f"decode={decoding[-1]} must be one of {', '.join(_DECODINGS)}")
    if options.max_tokens < 1:
        raise ConfigError(f"--max-tokens={options.max_tokens} must be at least 1")
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    is_contrast = decoding[-1:] == ["self_contrast"]
    contrast = SelfContrast(options.alpha, options.beta, _ranks(options.weak_ranks)) if is_contrast else None
    trained = open_run(options)
    tokenizer, _ = find_tokenizer(trained, options.tokenizer)
    ids = [int(token) for token in tokenizer.encode_batch([options.text])[0]]
    length = trained.config.model.sequence_length
    if not 0 < len(ids) < length:
        raise ConfigError(f"TEXT has {len(ids)} tokens, must have 1 to {length - 1}: the model was trained on {length}")
    model = trained.model(device_for_inference())
    if rule := check_generates(model, trained.config.router.name):
        _note(f"router={trained.config.router.name} decides here by its evaluation rule: {rule}")
    count = min(options.max_tokens, length - len(ids))
    generator = Generator(model, 1, len(ids) + count, sampling, contrast)
    print(options.text, end="", flush=True)
    for part in _texts(generator.next, tokenizer, ids, count, str(model.embedding.weight.device)):
        print(part, end="", flush=True)
    print()
    if count < options.max_tokens:
        _note(f"at most {count} new tokens: the model was trained on {length} in a row")
    return 0


def _ranks(words: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) - 1 for word in words.split(","))
    except ValueError:
        raise ConfigError(f"--weak-ranks={words} must be numbers from 1 on, such as 2 or 3,4") from None


def _note(line: str) -> None:
    print(f"moe-pretrain generate: {line}", file=sys.stderr)


def _texts(
    choose: Callable[[torch.Tensor], torch.Tensor], tokenizer: Tokenizer, ids: list[int], count: int, device: str
) -> Iterator[str]:
    """The new text in pieces; a character whose bytes are not all there yet waits for them."""
    prompt, new, said = torch.tensor([ids], device=device), list[int](), 0
    for _ in range(count):
        prompt = choose(prompt)
        token = int(prompt)
        if token == tokenizer.end_of_document:
            break
        new.append(token)
        text = tokenizer.decode(new)
        if not text.endswith("\ufffd"):
            yield text[said:]
            said = len(text)
    yield tokenizer.decode(new)[said:]
