"""Shell scripts as the importer reads them: words, variables, and that nothing is ever run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chord_megatron.importers.flags import read_arguments, read_keys
from chord_megatron.importers.shell import read_script
from chord_megatron.system.errors import UserError

TEXT = st.text(st.characters(exclude_categories=("Cs", "Co"), exclude_characters="\0\r"), max_size=12)
NAMES = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True)


def words_of(text: str) -> list[list[str]]:
    return [command.words for command in read_script(text, "x.sh").commands]


@given(st.lists(TEXT, min_size=1, max_size=6), st.sampled_from([" ", "  ", " \\\n  ", "\t"]))
def test_quoted_words_come_back(words: list[str], between: str):
    script = "swift " + between.join(map(shlex.quote, words))
    assert words_of(script) == [["swift", *words]]


@given(st.dictionaries(NAMES, st.lists(TEXT.filter(lambda text: not text.startswith("-")), max_size=3), max_size=5))
def test_flags_come_back(flags: dict[str, list[str]]):
    words = [word for name, values in flags.items() for word in (f"--{name}", *values)]
    assert read_arguments(words) == (flags, [])


@given(st.text(max_size=80))
def test_any_text_is_read_or_refused(text: str):
    try:
        read_script(text, "x.sh")
    except UserError as error:
        assert "x.sh" in str(error)


@given(st.lists(st.text(max_size=12), max_size=6))
def test_any_words_are_flags_or_not(words: list[str]):
    read_arguments(words)
    read_keys(words)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("swift rlhf --a 1 # not --b", [["swift", "rlhf", "--a", "1"]]),
        ("# swift rlhf\nswift rlhf", [["swift", "rlhf"]]),
        ("swift --dataset a/b#1000 'c#d' x", [["swift", "--dataset", "a/b#1000", "c#d", "x"]]),
        ("swift \\\n  --a 1 \\\n  --b 2\nls", [["swift", "--a", "1", "--b", "2"], ["ls"]]),
        ("swift \\\r\n --a 1", [["swift", "--a", "1"]]),
        ("A=1 B=2 swift --a $A", [["swift", "--a", "1"]]),
        ('S="two words"\nswift --s "$S" --t $S', [["swift", "--s", "two words", "--t", "two", "words"]]),
        ("swift --s '$S' \\$T \"\\$U\"", [["swift", "--s", "$S", "$T", "$U"]]),
        ('A=x; B="${A}y"; swift ${B}z', [["swift", "xyz"]]),
        ("TP=${TP:-2}\nswift tp=$TP ${X:-3}", [["swift", "tp=2", "3"]]),
        ("A=2\nswift $((A * 1024)) x=$(( (${A}+1)*$A ))y", [["swift", "2048", "x=6y"]]),
        ("swift $((2 ** 99)) ${1:-4}", [["swift", "$(...)", "4"]]),
        ('D=(\n  a=1 # first\n  b="x y"\n)\nswift "${D[@]}" $@', [["swift", "a=1", "b=x y"]]),
        ("swift a 2>&1 | tee log.txt", [["swift", "a"], ["tee", "log.txt"]]),
        ("swift a > log.txt 2> err", [["swift", "a"]]),
        ("swift a &> log", [["swift", "a"]]),
        ("cat <<EOF\nswift it's\nEOF\nswift a", [["cat"], ["swift", "a"]]),
        ("export A=1 && swift $A; swift b", [["swift", "1"], ["swift", "b"]]),
        ("S='line\\none'\nswift \"$S\"", [["swift", "line\\none"]]),
        ("swift --c '{\"a\": 1}'", [["swift", "--c", '{"a": 1}']]),
    ],
)
def test_words(script: str, words: list[list[str]]):
    assert words_of(script) == words


def test_what_the_script_does_not_say_stays_and_is_named():
    (command,) = read_script("swift --a $HOME/x --b $(date +%s) --c `id`", "x.sh").commands
    assert command.words == ["swift", "--a", "$HOME/x", "--b", "$(...)", "--c", "$(...)"]
    assert command.unresolved == ["$HOME", "$(...)", "$(...)"]


def test_what_the_script_does_not_say_goes_along_with_its_variables():
    *_, command = read_script("A=$HOME/x\nB=$A/y\nswift $B", "x.sh").commands
    assert command.words == ["swift", "$HOME/x/y"]
    assert command.unresolved == ["$HOME"]


def test_what_the_environment_says_is_expanded_as_by_the_shell():
    surroundings = {"HOME": "/home/a b", "TP": "4", "A": "theirs"}
    script = 'A=1\nOUT="$HOME/out"\nTP=${TP:-2}\nswift "$OUT" $HOME \'$HOME\' $TP $A ${X:-3} $Y'
    *_, command = read_script(script, "x.sh", surroundings).commands
    assert command.words == ["swift", "/home/a b/out", "/home/a", "b", "$HOME", "4", "1", "3", "$Y"]
    assert command.unresolved == ["$Y"]
    assert command.environment == {"A": "1", "OUT": "/home/a b/out", "TP": "4"}


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("swift a${X:-1} b${X-2} c$X", ["swift", "a1", "b", "c"]),
        ("swift a${Y:-1} b${Y-2} c${Z-3}", ["swift", "ay", "by", "c3"]),
        ("Y=\nswift a${Y:-1} b${Y-2} c$Y", ["swift", "a1", "b", "c"]),
        ('Y=()\nswift "${Y[@]}" "${Y[@]:-1}"', ["swift", "1"]),
    ],
)
def test_a_default_with_a_colon_is_also_for_what_is_empty(script: str, words: list[str]):
    *_, command = read_script(script, "x.sh", {"X": "", "Y": "y"}).commands
    assert command.words == words


@pytest.mark.parametrize(
    "script",
    [
        "for LR in 1 2; do swift $LR; done",
        "for B in 1; do for LR in 1 2; do\nswift ${LR:-3}",
        "while read LR; do swift $LR",
        "while IFS=, read -r B LR; do swift $LR",
        "read -r LR < rates\nswift $LR",
        "LR=3\nfor LR in 1 2; do swift $LR",
    ],
)
def test_what_a_script_sets_as_it_runs_nobody_says(script: str):
    """Neither the shell around it nor an earlier line."""
    (command,) = (each for each in read_script(script, "x.sh", {"LR": "9"}).commands if "swift" in each.words)
    assert command.words == ["swift", "$LR"]
    assert "$LR" in command.unresolved


def test_a_word_that_is_no_command_sets_nothing():
    *_, command = read_script("echo for LR; swift read LR $LR", "x.sh", {"LR": "9"}).commands
    assert command.words == ["swift", "read", "LR", "9"]


def test_what_is_withheld_counts_as_unset_and_is_said_once():
    surroundings = {"MAX_TOKENS": None, "OWN_KEY": None, "OTHER_KEY": None}
    script = read_script("OWN_KEY=1\nswift ${MAX_TOKENS:-7} $MAX_TOKENS $OWN_KEY", "x.sh", surroundings)
    assert script.commands[-1].words == ["swift", "7", "$MAX_TOKENS", "1"]
    assert script.commands[-1].unresolved == ["$MAX_TOKENS"]
    assert script.notes == ["$MAX_TOKENS of this shell is not read: its name or its value speaks of a secret"]


def test_the_environment_of_a_command():
    script = "export NPROC_PER_NODE=8\nCUDA_VISIBLE_DEVICES=0,1 swift rlhf"
    (command,) = read_script(script, "x.sh").commands
    assert command.environment == {"NPROC_PER_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1"}


def test_branches_are_said():
    notes = read_script("if true; then\nA=1\nelse\nA=2\nfi\nswift $A", "x.sh").notes
    assert notes == ["x.sh branches or loops (if); each of its lines was read as if it ran"]


def test_nothing_is_run(tmp_path: Path):
    mark = tmp_path / "mark"
    read_script(f"touch {mark}\n$(touch {mark})\nA=`touch {mark}`\nswift ${{X:-$(touch {mark})}}", "x.sh")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("swift 'a", 'x.sh is no shell script: No closing quotation in "swift \'a"; mend it'),
        ("swift \ue000", "x.sh holds characters of Unicode's private area (U+E000 to U+E005); remove them"),
        (
            "A=xxxxxxxxxxxxxxxxxxxx\n" + "A=$A$A\n" * 30 + "swift $A",
            "x.sh has a word of more than 100000 characters; shorten its variables",
        ),
    ],
)
def test_refused(script: str, sentence: str):
    with pytest.raises(UserError) as caught:
        read_script(script, "x.sh")
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("words", "keys", "others"),
    [
        (["a.b=1", "+c=2", "++d.e=x=y"], {"a.b": ["1"], "c": ["2"], "d.e": ["x=y"]}, []),
        (["a.files=['x', 'y']", 'a.g=["z"]'], {"a.files": ["x", "y"], "a.g": ["z"]}, []),
        (["a.b='error'", "~a.c", "plain"], {"a.b": ["error"]}, ["plain"]),
        (["a.b=null", "a.b=1"], {"a.b": ["1"]}, []),
        (["a.b=null"], {"a.b": ["null"]}, []),
    ],
)
def test_keys_of_hydra(words: list[str], keys: dict[str, list[str]], others: list[str]):
    assert read_keys(words) == (keys, others)
