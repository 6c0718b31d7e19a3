"""Method expressions: reading, expanding, the canonical form, and errors that fit on a line."""

from __future__ import annotations

import importlib
import io
import re
import sys
from dataclasses import dataclass

import pytest
from rich.console import Console

import methods
from bench.verbs import listing
from methods import registry
from methods.registry import Configured, Method, MethodError, NoOptions, all_methods, get, parse, register


def canonical(text):
    return [configured.expression for configured in parse(text)]


@pytest.fixture
def clean_registry(monkeypatch):
    all_methods()  # what is imported only now would be forgotten with the copy
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(registry, "_BROKEN", {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ours", ["bdta_mote"]),
        ("bdta_mote", ["bdta_mote"]),
        ("ours[]", ["bdta_mote"]),
        ("ours[r=4]", ["bdta_mote"]),
        ("ours[r=4,direction=both,mote=on]", ["bdta_mote"]),
        ("ours[mote=off,r=2]", ["bdta_mote[r=2,mote=off]"]),
        (" ours[ r = 2 , mote = FALSE ] ", ["bdta_mote[r=2,mote=off]"]),
        ("ours[direction=g2t]", ["bdta_mote[direction=g2t]"]),
        ("mtlora[scale=4]", ["mtlora"]),
        ("mtlora[dropout=0,rank=16]", ["mtlora[rank=16,dropout=0]"]),
        ("ours,mtlora", ["bdta_mote", "mtlora"]),
        ("mtlora,ours,mtlora[rank=64]", ["mtlora", "bdta_mote"]),
        ("ours[r=2|4|8]", ["bdta_mote[r=2]", "bdta_mote", "bdta_mote[r=8]"]),
        ("ours[r=2|2]", ["bdta_mote[r=2]"]),
        (
            "ours[r=2|4,direction=g2t|t2g]",
            [f"bdta_mote[{r}direction={d}]" for r in ("r=2,", "") for d in ("g2t", "t2g")],
        ),
        ("ours,mtlora,ours[r=2],-ours", ["mtlora"]),
        ("ours,-bdta_mote,ours[r=2]", ["bdta_mote[r=2]"]),
        ("multi_task_full[backbone_factor=0.50]", ["multi_task_full[backbone_factor=0.5]"]),
        ("ours[r=2,mote=off],mtlora[rank=16|32]", ["bdta_mote[r=2,mote=off]", "mtlora[rank=16]", "mtlora[rank=32]"]),
    ],
)
def test_expressions(text, expected):
    assert canonical(text) == expected


def test_all_is_every_method_by_name():
    assert canonical("all") == sorted(all_methods()) == list(all_methods())
    assert canonical("mtlora,all,ours[r=2]")[0] == "mtlora"
    assert set(canonical("mtlora,all,ours[r=2]")) == {*all_methods(), "bdta_mote[r=2]"}
    assert set(canonical("all,-mtlora")) == {*all_methods()} - {"mtlora"}


@pytest.mark.parametrize("text", ["ours", "ours[r=8,mote=off]", "mtlora[rank=16,scale=0.5,dropout=0.1234567]"])
def test_canonical_form_reads_back_as_itself(text):
    (configured,) = parse(text)
    assert parse(configured.expression) == [configured]


def test_values_reach_the_options():
    (configured,) = parse("mtlora[rank=16,drop_path=0.3]")
    assert (configured.options.rank, configured.options.drop_path, configured.options.scale) == (16, 0.3, 4.0)
    assert configured.changed() == {"rank": 16, "drop_path": 0.3}


def test_titles_and_published_rows():
    (default,), (off,), (odd,) = parse("ours"), parse("ours[mote=off]"), parse("ours[r=2,mote=off]")
    assert default.title == default.method.title and odd.title == f"{default.method.title} [r=2, mote=off]"
    assert (default.published_row, off.published_row, odd.published_row) == ("Ours", "Ours, BDTA only", None)


def test_aliases_lead_to_the_method():
    assert get("ours") is get("bdta_mote") is all_methods()["bdta_mote"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mtlorra", r"unknown method 'mtlorra' \(did you mean 'mtlora'\?\)"),
        ("zzzzzz", r"unknown method 'zzzzzz'; `bench list methods` shows all"),
        ("all[r=2]", r"unknown method 'all'"),
        ("ours[rr=2]", r"bdta_mote has no option 'rr' \(did you mean 'r'\?\); its options: r, direction, mote"),
        ("decoder_only[r=2]", r"decoder_only has no option 'r'; its options: none"),
        ("ours[r]", r"option 'r' of bdta_mote needs a value, e.g. r=4"),
        ("ours[mote=]", r"option 'mote' of bdta_mote needs a value, e.g. mote=on"),
        ("ours[r=two]", r"'two' is not a valid int"),
        ("ours[r=2|]", r"'' is not a valid int"),
        ("ours[r=2.5]", r"'2.5' is not a valid int"),
        ("mtlora[scale=x]", r"'x' is not a valid float"),
        ("ours[mote=maybe]", r"'maybe' is neither on nor off"),
        ("ours[direction=g2tt]", r"'g2tt' is not one of both, g2t, t2g \(did you mean 'g2t'\?\)"),
        ("ours[r=0]", r"bdta_mote: r must be at least 1, not 0"),
        ("ours[r=4|-1]", r"bdta_mote: r must be at least 1, not -1"),
        ("mtlora[task_rank=0]", r"mtlora: task_rank must be at least 1, not 0"),
        ("mtlora[dropout=1]", r"mtlora: dropout must be in \[0, 1\), not 1"),
        ("mtlora[dropout=nan]", r"is not a finite number"),
        ("single_task_full[backbone_factor=2]", r"backbone_factor must be above 0 and at most 1, not 2"),
        ("single_task_full[backbone_factor=0]", r"backbone_factor must be above 0 and at most 1, not 0"),
        ("single_task_full[backbone_factor=x]", r"'x' is not a valid float"),
        ("single_task_full[backbone_factor]", r"option 'backbone_factor' of single_task_full needs a value$"),
        ("ours,-mtlora", r"-mtlora takes nothing out: mtlora is not among the methods before it"),
        ("ours,-mtlor", r"unknown method 'mtlor' \(did you mean 'mtlora'\?\)"),
        ("ours,-ours", r"'ours,-ours' takes out every method"),
        ("all,-lora[rank=4]", r"-lora\[rank=4\]: write -NAME"),
        ("all,-all", r"-all: write -NAME"),
        ("lora[rank=0]", r"lora: rank must be at least 1, not 0"),
        ("vpt_deep[prompts=0]", r"vpt_deep: prompts must be at least 1, not 0"),
        ("vmt_adapter[s=1]", r"vmt_adapter: s must be between 0 and 1, not 1"),
        ("vmt_adapter_lite[m=0]", r"vmt_adapter_lite: m must be at least 1, not 0"),
        ("ditask[cells=1]", r"ditask: cells and task_cells must be at least 2, not 1 and 4"),
        ("progressive[groups=-1]", r"groups must be auto, a number, or groups like semseg\+human_parts-saliency"),
        ("progressive[groups=a/b]", r"groups must be auto, a number, or groups like semseg\+human_parts-saliency"),
        ("progressive[groups=0]", r"progressive: groups must be at least 1, not 0"),
        ("adapter[sharing=share]", r"'share' is not one of per_task, shared \(did you mean 'shared'\?\)"),
        ("peft:dorra", r"peft has no method 'dorra' for linear layers \(did you mean 'dora'\?\)"),
        ("peft:dora[rank=-1]", r"peft:dora: rank must be at least 1, or 0 for the tuner's own, not -1"),
        ("peft:adalora", r"peft has no method 'adalora' for linear layers"),
        ("ours[r=2", r"unbalanced brackets in 'ours\[r=2'"),
        ("ours r=2]", r"unbalanced brackets"),
        ("ours]r=2[", r"cannot read method expression"),
        ("ours[[r=2]]", r"cannot read method expression"),
        ("ours[r=2]x", r"cannot read method expression"),
        ("ours mtlora", r"cannot read method expression 'ours mtlora'"),
        ("", r"no method given"),
        (" , ,", r"no method given"),
    ],
)
def test_errors_fit_on_a_line(text, message):
    with pytest.raises(MethodError, match=message) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_an_option_given_twice_is_refused():
    with pytest.raises(MethodError):
        parse("ours[r=2,r=8]")


@pytest.mark.parametrize(
    ("name", "aliases"), [("bdta_mote", ()), ("ours", ()), ("fresh", ("mtlora",)), ("fresh", ("new", "ours"))]
)
def test_a_taken_name_is_refused(clean_registry, name, aliases):
    before = dict(registry._METHODS)
    with pytest.raises(MethodError, match="is already taken by") as caught:
        register(Method(name, "Fresh", "multi-task PEFT", "", build=lambda *args: None, aliases=aliases))
    assert registry._METHODS == before and "\n" not in str(caught.value)


@dataclass(frozen=True)
class Options:
    width: int = 8
    gain: float = 0.5


def test_registered_options_are_read_by_their_types(clean_registry):
    built = []
    register(Method("fresh", "Fresh", "multi-task PEFT", "", build=lambda *a: built.append(a), options=Options))
    (configured,) = parse("fresh[gain=2]")
    configured.build("backbone", {"depth": 1}, "setting")
    assert built == [("backbone", {"depth": 1}, Options(8, 2.0), "setting")]
    assert configured.expression == "fresh[gain=2]"


def test_a_new_file_is_found_by_itself(clean_registry, monkeypatch, tmp_path):
    (tmp_path / "newcomer_method.py").write_text(
        "from methods.registry import Method, register\n"
        "register(Method('newcomer', 'Newcomer', 'single-task PEFT', '', build=lambda *args: 'built'))\n"
    )
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    try:
        assert "newcomer" in all_methods() and "newcomer" in canonical("all")
        assert parse("newcomer")[0].build(None, {}, None) == "built"
        with pytest.raises(MethodError, match="did you mean 'newcomer'"):
            get("newcommer")
    finally:
        sys.modules.pop("methods.newcomer_method", None)


SPOILT = {
    "import torch\nfrom nowhere_at_all import nothing\n": "ModuleNotFoundError: No module named 'nowhere_at_all'",
    "import torch\ndef build(:\n    pass\n": "SyntaxError: invalid syntax",
    "from methods.registry import Method, register\n"
    "register(Method('spoilt', 'Spoilt', 'single-task PEFT', '', build=print)).nothing\n": "AttributeError: .*nothing",
}  # fmt: skip


@pytest.mark.parametrize("text", SPOILT)
def test_a_file_that_cannot_be_imported_is_named_and_stops_nothing_else(clean_registry, tmp_path, monkeypatch, text):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "spoilt_method.py").write_text(text)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "methods")])
    said = rf"methods/spoilt_method.py cannot be imported: {SPOILT[text]}.* \((methods/)?spoilt_method.py, line 2\)"
    for ask in (all_methods, lambda: parse("all"), lambda: get("spoilt"), lambda: get("spoilt")):
        with pytest.raises(MethodError, match=said) as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert canonical("lora") == ["lora"] and get("peft:dora").name == "peft:dora"
    shown = io.StringIO()
    Console(file=shown, width=200).print(listing.table("methods"))
    assert re.search(said, shown.getvalue()) and "mtlora" in shown.getvalue()


def test_what_a_broken_file_has_imported_stays(clean_registry, tmp_path, monkeypatch):
    (tmp_path / "aaa_method.py").write_text("import methods.zzz_method\nimport nowhere_at_all\n")
    (tmp_path / "zzz_method.py").write_text(
        "from methods.registry import Method, register\n"
        "register(Method('zzz', 'Whole', 'single-task PEFT', '', build=print))\n"
    )
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    try:
        assert get("zzz").title == "Whole" and len(registry.broken()) == 1
    finally:
        sys.modules.pop("methods.zzz_method", None)


def test_a_file_that_takes_anothers_name_stops_all(clean_registry, tmp_path, monkeypatch):
    """Which of the two is meant nobody could say."""
    (tmp_path / "copied_method.py").write_text(
        "from methods.registry import Method, register\n"
        "register(Method('copied', 'Mine', 'single-task PEFT', '', build=print))\n"
        "register(Method('mtlora', 'Mine', 'single-task PEFT', '', build=print))\n"
    )
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    for _ in range(2):
        with pytest.raises(MethodError, match="'mtlora' is already taken by MTLoRA"):
            parse("lora")


def test_a_fault_in_a_methods_code_names_method_backbone_and_line(tiny_swin):
    def build(backbone, tasks, options, setting):
        return backbone.no_such_thing

    method = Method(name="faulty", title="Faulty", family="multi-task PEFT", citation="", build=build)
    message = r"faulty cannot be built on tiny_swin: AttributeError: .*no_such_thing.* line \d+\)"
    with pytest.raises(MethodError, match=message):
        Configured(method, NoOptions()).try_build(tiny_swin(), {}, None)
