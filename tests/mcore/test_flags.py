"""The list of Megatron's flags, which a machine without Megatron checks a command line by, against Megatron's own parser."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction

import pytest

from megatron_lighthouse.mcore.command_line import flags
from megatron_lighthouse.mcore.command_line.entry import with_all_arguments


def test_the_list_is_megatrons() -> None:
    """Names, how many words each takes, their types, choices and defaults."""
    from megatron.training.arguments import add_megatron_arguments

    own = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    assert flags.installed() == flags.VERSION
    assert [*flags.described(own)] == [*flags.listed()]
    made = flags.parser(lambda parser: parser)
    assert {*made._option_string_actions} == {*own._option_string_actions} - {"-h", "--help"}
    for name, action in made._option_string_actions.items():
        theirs = own._option_string_actions[name]
        assert (action.dest, action.nargs) == (theirs.dest, theirs.nargs)
        assert isinstance(action, BooleanOptionalAction) == isinstance(theirs, BooleanOptionalAction)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--num-layer 4", "--num-layer is not a known flag: did you mean --num-layers?"),
        ("--lighthouse-buget 8", "did you mean --lighthouse-budget?"),
        ("--seq-len=8", "--seq-len is not a known flag: did you mean --seq-length?"),
        ("--completely-else 1", "--completely-else is not a known flag: leave it out."),
        ("--swiglu yes", "yes follows no flag that takes it"),
    ],
)
def test_what_is_not_listed(words: str, says: str) -> None:
    _, wrong = flags.parse(words.split(), with_all_arguments)
    assert any(says in message for message in wrong), wrong
    assert flags.parse(words.split(), with_all_arguments, strict=False)[1] == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--num-layers four", "--num-layers four must be a whole number, in digits alone: give one."),
        ("--lr", "--lr: expected one argument."),
        ("--attention sparse", "--attention: invalid choice: 'sparse'"),
        ("--normalization Norm", "--normalization: invalid choice: 'Norm'"),
        ("--window-size 128,x", "--window-size 128,x must be whole numbers apart by commas, such as 128,0."),
        (
            "--window-attn-skip-freq [1,0",
            "--window-attn-skip-freq [1,0 must be a whole number N, of each N-th layer, or a list",
        ),
        ("--no-rope-freq all", "--no-rope-freq all must be a whole number N"),
    ],
)
def test_a_value_that_a_flag_does_not_take(words: str, says: str) -> None:
    _, wrong = flags.parse(words.split(), with_all_arguments)
    assert [says in one for one in wrong] == [True], wrong


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("--attention lighthous", "lighthouse"),
        ("--normalization rmsnorm", "RMSNorm"),
        ("--optimizer AdamW", "adam"),
        ("--attention sparse", None),
    ],
)
def test_a_choice_that_may_be_meant_is_gone_on_with(words: str, meant: str | None) -> None:
    """So that what is wrong with it is said in the same round."""
    args, wrong = flags.parse(words.split(), with_all_arguments)
    flag = words.split()[0]
    assert len(wrong) == 1
    assert wrong[0].endswith(f" Did you mean {meant}?" if meant else ").")
    assert getattr(args, flag[2:]) == (meant or "dense")
    assert args.malformed == ({flag} if meant is None else set())


def test_dashes_among_the_words_hide_nothing() -> None:
    args, wrong = flags.parse("--num-layers 2 -- --lr 1 --seq-len 8".split(), with_all_arguments)
    assert (args.num_layers, args.lr, len(wrong)) == (2, 1, 2)
    assert wrong[0] == "-- among the arguments hides all flags behind it: leave it out."


@pytest.mark.parametrize(
    ("flag", "value", "found"),
    [
        ("--hybrid-layer-pattern", "-*-*", "-*-*"),
        ("--hybrid-layer-pattern", "--*E", "--*E"),
        ("--window-size", "-1,0", (-1, 0)),
        ("--min-lr", "-1e-3", -1e-3),
    ],
)
def test_a_value_that_looks_like_a_flag(flag: str, value: str, found: object) -> None:
    """It is gone on with; a word that is a flag, or a number, is what it is."""
    args, wrong = flags.parse([flag, value, "--lr", "-1", "--num-layer", "2"], with_all_arguments)
    assert getattr(args, flag[2:].replace("-", "_")) == found
    said = f"{flag} {value}: a value that begins with - follows an equals sign: write {flag}={value}."
    assert wrong == [said, "--num-layer is not a known flag: did you mean --num-layers?"]
    assert flags.parse([f"{flag}={value}"], with_all_arguments)[1] == []
    assert flags.parse([flag, "--seq-len", "8"], with_all_arguments)[1][0] == f"{flag}: expected one argument."
    named, none = flags.parse(["--wandb-exp-name", "-a run"], with_all_arguments)  # a word with a space is no flag to argparse
    assert (named.wandb_exp_name, none) == ("-a run", [])


def test_a_malformed_value_hides_nothing() -> None:
    """Each is said; the number that may be meant is taken, else the flag's default, and what follows from that is left out."""
    words = "--lr abc --lighthouse-budget 2k --train-iters 1e3 --bf16=yes --swiglu --seq-length --window-size 128,x"
    words += " --profile-ranks 1 2e0 --attention sparse --lighthouse-bugdet 5"
    args, wrong = flags.parse(words.split(), with_all_arguments)
    said = " ".join(wrong)
    for flag in ("--lr abc", "--lighthouse-budget 2k", "--train-iters 1e3", "--seq-length", "--window-size", "--attention"):
        assert said.count(f"{flag} ") + said.count(f"{flag}:") == 1, wrong
    assert "--bf16 takes no value: leave =yes out." in wrong
    assert "--profile-ranks 2e0 must be a whole number, in digits alone: write 2." in wrong
    assert "--lighthouse-bugdet is not a known flag: did you mean --lighthouse-budget?" in wrong
    assert (args.lr, args.lighthouse_budget, args.train_iters, args.seq_length) == (None, 2048, 1000, None)
    assert (args.bf16, args.swiglu, args.window_size, args.profile_ranks, args.attention) == (True, True, None, [1, 2], "dense")
    assert args.malformed == {"--lr", "--seq-length", "--window-size", "--attention"}
    found = ["--lr is missing: add it.", "use --lr-decay-iters 3.", "--min-lr 3: use --lr 4."]
    assert flags.apart(found, args.malformed) == ["use --lr-decay-iters 3."]
    assert flags.apart(found, ()) == found


def test_what_is_parsed_without_megatron() -> None:
    args, wrong = flags.parse("--window-size (128,0) --no-mmap-bin-files --cp-comm-type p2p a2a".split(), with_all_arguments)
    assert wrong == []
    assert (args.window_size, args.mmap_bin_files, args.cp_comm_type) == ((128, 0), False, ["p2p", "a2a"])
    assert (args.attention_dropout, args.attention_backend, args.multi_latent_attention) == (0.1, "auto", False)
