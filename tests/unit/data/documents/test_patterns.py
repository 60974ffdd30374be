"""Every match of ``data.paths`` is read once, or named in an error."""

import os
import re
import socket
import subprocess
import sys

import pytest

from moe_pretrain.data.documents.patterns import match_files

ENDINGS = (".txt", ".jsonl")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.txt", "a/2.txt", "a/b/3.txt", "a/b/c/4.jsonl", "d/5.txt", "a/.hidden/6.txt", "a/.7.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def names(tree, *paths):
    return [str(path.relative_to(tree)) for path in match_files(paths, ENDINGS).files]


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("a/1.txt", ["a/1.txt"]),
        ("a/*.txt", ["a/1.txt", "a/2.txt"]),
        ("./a/[12].txt", ["a/1.txt", "a/2.txt"]),
        ("*/?.txt", ["a/1.txt", "a/2.txt", "d/5.txt"]),
        ("**/*.txt", ["a/1.txt", "a/2.txt", "a/b/3.txt", "d/5.txt"]),
        ("a/**", ["a/1.txt", "a/2.txt", "a/b/3.txt", "a/b/c/4.jsonl"]),
        ("a/**/*", ["a/1.txt", "a/2.txt", "a/b/3.txt", "a/b/c/4.jsonl"]),
        ("a/**/c/*", ["a/b/c/4.jsonl"]),
        ("*/b/3.txt", ["a/b/3.txt"]),
        ("a/.h*/*.txt", ["a/.hidden/6.txt"]),
    ],
)
def test_patterns_match_as_in_a_shell(tree, pattern, expected):
    assert names(tree, pattern) == names(tree, f"{tree}/{pattern}") == expected


def test_the_order_is_that_of_the_list_and_a_file_with_magic_letters_is_itself(tree):
    (tree / "[ab].txt").write_text("x")
    assert names(tree, "d/*.txt", "[ab].txt", "a/2.txt", "a/*.txt") == ["d/5.txt", "[ab].txt", "a/2.txt", "a/1.txt"]


@pytest.mark.parametrize("link", ["a/again.txt", "0.txt", "a/b/2.txt"])
@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_a_file_with_two_names_is_read_once_and_that_is_said(tree, link, make):
    make(tree / "a/2.txt", tree / link)
    found = match_files(("**/*.txt",), ENDINGS)
    assert len(found.files) == 4 and len(found.again) == 1
    assert "1 name leads to a file that is listed under another name" in found.describe_again()


def test_two_ways_of_writing_a_path_are_one_file(tree):
    found = match_files(("a/1.txt", "a/../a/1.txt", "./a/1.txt", str(tree / "a/1.txt")), ENDINGS)
    assert found.files == [tree / "a/1.txt"] and len(found.again) == 1  # of the others the words are the same


def test_circles_of_links_end_and_straight_names_win(tree):
    (tree / "a/b/self").symlink_to(".")
    (tree / "a/b/c/up").symlink_to("../..")
    (tree / "0").symlink_to("a/b")
    (tree / "d/circle").symlink_to("circle")
    found = match_files(("**/*.txt",), ENDINGS)
    assert [str(path.relative_to(tree)) for path in found.files] == ["a/1.txt", "a/2.txt", "a/b/3.txt", "d/5.txt"]


def test_folders_behind_links_are_searched(tree, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "8.txt").write_text("x")
    (tree / "a/link").symlink_to(elsewhere)
    assert names(tree, "a/**/*.txt") == ["a/1.txt", "a/2.txt", "a/b/3.txt", "a/link/8.txt"]


@pytest.mark.parametrize(
    "make, pattern, words",
    [
        (
            lambda t: (t / "a/9.txt").symlink_to("gone.txt"),
            "a/*.txt",
            "a/9.txt, which a/*.txt matches, is a link to gone.txt",
        ),
        (
            lambda t: (t / "a/9.txt").symlink_to("gone.txt"),
            "a/9.txt",
            "a/9.txt is a link to gone.txt, which does not exist",
        ),
        (
            lambda t: (t / "a/9.txt").symlink_to("9.txt"),
            "**/*.txt",
            "a/9.txt, which **/*.txt matches, is a link that leads in a circle",
        ),
        (lambda t: (t / "a/9.txt").mkdir(), "a/*.txt", "4 matches"),
        (lambda t: os.mkfifo(t / "a/9.txt"), "a/*.txt", "no regular file"),
        (lambda t: None, "a/*", "a/b, which a/* matches, is a folder: name its files too (a/b/*.txt)"),
        (lambda t: _folder_called(t / "a/7.jsonl"), "a/*.jsonl", "name its files too (a/7.jsonl/*.jsonl)"),
        (lambda t: None, "a", "a is a folder, write a pattern: a/*.txt"),
        (lambda t: None, "a/b/*.txt/x", "pattern a/b/*.txt/x matches no file"),
        (lambda t: None, "x/1.txt", "x/1.txt does not exist"),
        (lambda t: None, "a/1.txt/x", "does not exist"),
        (lambda t: None, "~/1.txt", "~ is not replaced"),
        (lambda t: None, "a/**/*.csv", "matches no file"),
        (lambda t: (t / "a/9.csv").write_text("x"), "a/*.csv", "a/9.csv: name must end in one of .txt .jsonl"),
    ],
)
def test_what_is_no_file_is_named(tree, make, pattern, words):
    make(tree)
    if words == "4 matches":  # an empty folder has nothing that could be lost; one with a file has
        assert len(names(tree, pattern)) == 2
        (tree / "a/9.txt/part.txt").write_text("x")
        assert len(names(tree, "a/**/*.txt")) == 4
        words = "a/9.txt, which a/*.txt matches, is a folder"
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        match_files((pattern,), ENDINGS)
    assert str(error.value).startswith("data.paths: ") and "\n" not in str(error.value)


def test_a_socket_is_no_file(tree):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("9.txt")
        with pytest.raises(ValueError, match="9.txt, which .* is no regular file"):
            match_files(("*.txt",), ENDINGS)


AS_NOBODY = """
import os, sys
from moe_pretrain.data.documents.patterns import match_files
os.setgid(65534); os.setuid(65534)
for pattern in sys.argv[1:]:
    try:
        print(len(match_files((pattern,), (".txt", ".jsonl")).files))
    except ValueError as error:
        print(error)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_without_permission_is_one_line_whatever_the_pattern(tree):
    """Of a folder that cannot be listed, of one that cannot be entered, and of a file."""
    for folder in (tree, *tree.parents):
        if folder.owner() == "root" and len(folder.parts) > 2:
            folder.chmod(0o755)
    (tree / "a/b").chmod(0o700)
    (tree / "d").chmod(0o744)
    (tree / "a/2.txt").chmod(0o600)
    patterns = ["a/b/3.txt", "a/b/*.txt", "a/*/3.txt", "a/**/*.jsonl", "d/*.txt", "d/5.txt", "a/*.txt", "a/1.txt"]
    ran = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, *(f"{tree}/{pattern}" for pattern in patterns)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = ran.stdout.splitlines()
    assert lines[-1] == "1", ran
    for pattern, line in zip(patterns[:-1], lines[:-1], strict=True):
        assert line.startswith("data.paths: ") and "Permission denied" in line, (pattern, line)


def _folder_called(folder) -> None:
    folder.mkdir()
    (folder / "part.jsonl").write_text("{}")
