"""Pictures that show what is there, a log that survives a kill, and the table for the README."""

from __future__ import annotations

import doctest
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from gradcache_clip.train.evaluation.held_out import HeldOut
from gradcache_clip.train.evaluation.held_out_texts import HeldOutTexts
from gradcache_clip.train.evaluation.labelled import LabelledImages, LabelMetrics
from gradcache_clip.train.evaluation.recall import recall_at_k
from gradcache_clip.train.report import (
    MetricsLog,
    RunCurve,
    RunFigures,
    curves,
    draw_curves,
    format_bytes,
    metrics_log,
    metrics_table,
    pictures,
    read_log,
    style,
    table,
    to_markdown,
)
from gradcache_clip.train.report.pictures import (
    draw_gallery,
    draw_neighbours,
    draw_similarity,
    draw_text_gallery,
)

HOSTILE = [
    "",
    "an open $x_{$ formula",
    r"\frac{1}{2} $\alpha$ ^ _ % # &",
    "grinning face \N{GRINNING FACE} \N{ZERO WIDTH JOINER}\N{VARIATION SELECTOR-16}",
    "two\nlines\tand a tab\r",
    "犬 und ein Hund",
    "\u202eright to left\u202c عربى",
    "half a pair \ud83d and \x00 and \x1b[31m",
    "very long " * 60,
    "e\N{COMBINING ACUTE ACCENT}" * 9,
    "W" * 300,
    "[bold]markup[/bold]",
]


def held_out(images: Tensor, texts: Tensor, captions: list[str] | None = None) -> HeldOut:
    """Row i of both belongs together; images are plain squares."""
    count = len(images)
    captions = captions or [f"caption {i}" for i in range(count)]
    squares = torch.full((count, 3, 16, 16), 200, dtype=torch.uint8)
    return HeldOut(
        images, texts, torch.arange(count), torch.arange(count), captions, captions, squares
    )


def count_of(color: str, path: Path) -> int:
    """Pixels of a color."""
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    with Image.open(path) as image:
        pixels = numpy.asarray(image.convert("RGB")).astype(int)
    return int((numpy.abs(pixels - wanted).max(2) <= 2).sum())


@pytest.fixture(autouse=True)
def _untouched_settings() -> Iterator[None]:
    """No picture may change the program's own matplotlib."""
    pyplot = "matplotlib.pyplot" in sys.modules
    # Reading the settings themselves, other than a copy of them, would choose a backend.
    before = dict(matplotlib.rcParams.copy())
    yield
    assert dict(matplotlib.rcParams.copy()) == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot


@pytest.fixture
def figures_saved(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures that were saved, laid out, and the files left out."""
    saved: list[Any] = []

    def save(figure: Any, path: Any) -> Any:
        figure.draw_without_rendering()
        saved.append(figure)
        return path

    for module in (curves, pictures):
        monkeypatch.setattr(module, "save_figure", save)
    return saved


def texts_in(figure: Any) -> set[str]:
    return {text.get_text() for axes in figure.axes for text in axes.texts}


class TestSimilarity:
    def test_the_diagonal_holds_the_right_pairs(self, figures_saved: list[Any]) -> None:
        features = normalize(torch.randn(24, 40), dim=1)
        draw_similarity(held_out(features, features), "s.png", of="Some pairs")
        [figure] = figures_saved
        matrix, legend = figure.axes[0], figure.get_supxlabel()
        assert (matrix.images[0].get_array().argmax(1) == numpy.arange(24)).all()
        assert figure.get_suptitle().startswith("24 of 24 images are closest to their own")
        assert legend.startswith("Some pairs: each image")
        captions = {label.get_text() for label in matrix.get_xticklabels()}
        assert captions == {f"caption {i}" for i in range(24)}

    def test_wrong_picks_are_framed(self, tmp_path: Path) -> None:
        features = torch.eye(8)
        framed = [
            count_of("#e8590c", draw_similarity(held_out(features, texts), tmp_path / "s.png"))
            for texts in (features, features.roll(1, 0))
        ]
        # One frame is in the legend.
        assert 20 < framed[0] < framed[1] / 5

    def test_one_image_of_a_group_beside_its_first_caption(self, figures_saved: list[Any]) -> None:
        groups, owners = torch.arange(100) // 2, torch.arange(150) // 3
        captions = [f"{'more' if i % 3 else 'first'} {i // 3}" for i in range(150)]
        features, images = torch.randn(100, 6), torch.zeros(100, 3, 4, 4, dtype=torch.uint8)
        pairs = HeldOut(features, torch.randn(150, 6), groups, owners, captions, captions, images)
        draw_similarity(pairs, "s.png")
        labels = {label.get_text() for label in figures_saved[0].axes[0].get_xticklabels()}
        assert len(labels) == 40 and all(label.startswith("first") for label in labels)

    def test_look_alikes_are_side_by_side(self, figures_saved: list[Any]) -> None:
        group = torch.randperm(32) % 4
        features = torch.eye(16)[group] + 0.01 * torch.randn(32, 16)
        captions = [str(number) for number in group.tolist()]
        draw_similarity(held_out(features, features, captions), "s.png")
        labels = [int(label.get_text()) for label in figures_saved[0].axes[0].get_xticklabels()]
        assert (torch.tensor(labels).diff() != 0).sum() == 3

    @pytest.mark.parametrize("features", [torch.ones(3, 4), torch.zeros(3, 4), torch.eye(2)])
    def test_degenerate_features(self, tmp_path: Path, features: Tensor) -> None:
        assert draw_similarity(held_out(features, features), tmp_path / "new" / "s.png").is_file()


class TestGallery:
    def draw(self, path: Path, *, right: bool, count: int = 20, **options: int) -> Path:
        features = torch.eye(count)
        # The partner of each is its opposite: the last of all candidates.
        return draw_gallery(held_out(features, features if right else -features), path, **options)

    def test_green_only_where_right(self, tmp_path: Path) -> None:
        good = self.draw(tmp_path / "good.png", right=True, rows=2)
        bad = self.draw(tmp_path / "bad.png", right=False, rows=2)
        assert count_of(style.RIGHT, good) > 4 * 300
        assert count_of(style.RIGHT, bad) == 0

    def test_says_where_the_right_answer_is(self, figures_saved: list[Any]) -> None:
        self.draw(Path("g.png"), right=False, rows=2)
        self.draw(Path("g.png"), right=True, rows=2)
        bad, good = figures_saved
        assert "right: rank 20" in texts_in(bad) and "\nright: rank 20" in texts_in(bad)
        assert not any("rank" in text for text in texts_in(good))
        for figure, count in ((bad, 0), (good, 4)):
            title = f"First answer right for {count} of 4 random held-out queries"
            assert figure.get_suptitle() == title

    def test_what_is_found(self) -> None:
        queries, candidates = torch.eye(4), torch.eye(4)[[1, 0, 2, 3]]
        ids = torch.arange(4)
        generator = torch.Generator().manual_seed(0)
        answers = pictures.best_answers(
            queries, ids, candidates, ids, rows=9, depth=2, generator=generator
        )
        assert sorted(answer.query for answer in answers) == [0, 1, 2, 3]
        for answer in answers:
            assert answer.found[0] == [1, 0, 2, 3][answer.query]
            assert answer.right == [answer.query > 1, False] or answer.query < 2
            assert answer.rank == (1 if answer.query > 1 else 4)
            assert answer.scores[0] == 1.0

    def test_fewer_than_asked_for(self, tmp_path: Path) -> None:
        assert count_of(style.RIGHT, self.draw(tmp_path / "g.png", right=True, count=1)) > 300

    def test_same_seed_same_picture(self, tmp_path: Path) -> None:
        first, same, other = (
            self.draw(tmp_path / f"{i}.png", right=True, rows=2, depth=1, seed=seed).read_bytes()
            for i, seed in enumerate((1, 1, 2))
        )
        assert first == same != other

    def test_a_program_that_uses_tex_is_no_obstacle(self, tmp_path: Path) -> None:
        with matplotlib.rc_context({"text.usetex": True, "font.family": ["serif"]}):
            assert self.draw(tmp_path / "g.png", right=True, rows=1).is_file()


def test_text_gallery(figures_saved: list[Any]) -> None:
    """Two queries of three documents: the first finds its own, the second another."""
    queries = torch.tensor([[3.0, 0, 0, 0], [0, 1, 0, 5]])
    documents = torch.tensor([[1.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 2]])
    texts = ["a long question " * 20, "b"], ["one", "two " * 40, "three"]
    draw_text_gallery(
        HeldOutTexts(queries, documents, *texts, torch.tensor([0, 1])), "g.png", depth=1
    )
    [figure] = figures_saved
    assert figure.get_suptitle() == "First answer right for 1 of 2 random held-out queries"
    shown = texts_in(figure)
    assert len([patch for axes in figure.axes for patch in axes.patches]) == 1
    assert {"b", "\nright: rank 2", "1.00", "0.98", "one", "three"} <= shown
    assert any(text.count("\n") == 3 and text.endswith("…") for text in shown)
    colors = {
        text.get_color() for axes in figure.axes for text in axes.texts if text.get_text() == "one"
    }
    assert colors == {style.RIGHT}


def test_neighbours_are_others_of_the_set(figures_saved: list[Any]) -> None:
    features = normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), dim=1)
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 2, 2)
    metrics = LabelMetrics(1.0, 1.0, 0.5, images=4, classes=2)
    draw_neighbours(
        LabelledImages(features, ["a", "a", "b", "b"], images, metrics), "n.png", depth=2
    )
    [figure] = figures_saved
    for row in numpy.array(figure.axes).reshape(4, 4):
        query, best, second = (int(row[i].images[0].get_array()[0, 0, 0]) for i in (0, 2, 3))
        assert (query, best, second) in {(0, 1, 3), (1, 0, 3), (2, 3, 1), (3, 2, 1)}
        assert row[1].texts[0].get_text() == "aabb"[query]
        edges = [matplotlib.colors.to_hex(row[i].spines["left"].get_edgecolor()) for i in (2, 3)]
        assert edges == [style.RIGHT, style.WRONG]


class TestText:
    def test_no_caption_stops_a_picture(self, tmp_path: Path) -> None:
        features = torch.randn(len(HOSTILE), 4)
        pairs = held_out(features, features.roll(3, 0), HOSTILE)
        draw_similarity(pairs, tmp_path / "s.png")
        draw_gallery(pairs, tmp_path / "g.png", rows=len(HOSTILE))
        runs = [RunCurve(name, rows_of_a_run(3, 8), 8) for name in HOSTILE]
        draw_curves(runs, tmp_path / "c.png")

    def test_signs_that_the_font_lacks(self) -> None:
        assert style.short("dog \N{DOG FACE}", 99) == "dog \N{WHITE VERTICAL RECTANGLE}"
        assert style.short("a\n b\u200d\x00\ue000", 99) == "a b"


def rows_of_a_run(steps: int, candidates: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        rows.append({"step": step, "loss": math.log(candidates) / step, "accuracy": 0.5})
        if step % 5 == 0:
            rows.append({"step": step, "image_to_text_recall_at_1": step / 1000,
                         "text_to_image_recall_at_1": step / 500,
                         "image_to_text_recall_at_1_chance": 0.001})  # fmt: skip
    return rows


class TestCurves:
    def test_says_the_finding_and_shows_each_level_of_chance(
        self, figures_saved: list[Any]
    ) -> None:
        runs = [
            RunCurve("cached", rows_of_a_run(100, 1024), 1024),
            RunCurve("chunk", rows_of_a_run(50, 64), 64),
        ]
        draw_curves(runs, "c.png")
        [figure] = figures_saved
        assert figure.get_suptitle() == "Held-out recall@1: 15.0 % (cached) against 7.5 % (chunk)"
        loss, accuracy, recall = figure.axes
        levels = {round(float(line.get_ydata()[0]), 4) for line in loss.lines}
        assert {6.9315, 4.1589} <= levels
        assert {100 / 1024, 100 / 64} <= {float(line.get_ydata()[0]) for line in accuracy.lines}
        # A dense line lies faintly below the smoothed one.
        faint, smooth = loss.lines[:2]
        assert (faint.get_alpha(), smooth.get_alpha()) == (0.25, None)
        assert list(smooth.get_ydata()) == curves._smoothed(list(faint.get_ydata()))
        assert len([line for line in recall.lines if len(line.get_xdata()) in (20, 10)]) == 4
        for axes in (loss, accuracy, recall):
            assert axes.get_xlabel() == "optimizer step"
            assert axes.get_ylabel()

    def test_the_panel_of_held_out_figures_follows_the_log(self, figures_saved: list[Any]) -> None:
        queries = "query_to_document_recall_at_1"
        widths = {f"{queries}_of_{width}_numbers": 0.1 for width in (8, 32)}
        logs = [
            {"knn_accuracy": 0.5, "probe_accuracy": 0.75, "label_chance": 0.25},
            {queries: 0.5, f"{queries}_chance": 0.25, **widths},
        ]
        for log in logs:
            draw_curves([RunCurve("_run", [{"step": 1, "loss": 1.0, **log}], 8)], "c.png")
        classes, texts = figures_saved
        named = "Held-out images named by their nearest training images: 50.0 % (run)"
        assert classes.get_suptitle() == named
        assert texts.get_suptitle() == "Held-out recall@1: 50.0 % (run)"
        for figure, labels in (
            (classes, ["nearest training images", "linear classifier"]),
            (texts, ["query → document", "by the first 32 numbers", "by the first 8 numbers"]),
        ):
            _, accuracy, panel = figure.axes
            assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["run"]
            assert [text.get_text() for text in panel.get_legend().get_texts()] == labels
            assert 25 in {line.get_ydata()[0] for line in panel.lines if len(line.get_ydata())}

    def test_a_loss_that_is_no_softmax_has_a_level_of_its_own(
        self, figures_saved: list[Any]
    ) -> None:
        draw_curves([RunCurve("a", rows_of_a_run(9, 64), 64, chance=5.15)], "c.png")
        loss = figures_saved[0].axes[0]
        assert 5.15 in {float(line.get_ydata()[0]) for line in loss.lines}
        assert "dotted: chance, 5.15" in {text.get_text() for text in loss.texts}

    def test_gaps_and_one_point_and_no_evaluation(self, tmp_path: Path) -> None:
        rows = [{"step": 1, "loss": None}, {"step": 2, "loss": 3.0}, {"step": 3, "loss": math.nan}]
        assert count_of(style.MAIN, draw_curves([RunCurve("a", rows, 2)], tmp_path / "c.png")) > 5

    def test_nothing_to_draw(self, tmp_path: Path) -> None:
        for runs in ([], [RunCurve("a", [], 2)], [RunCurve("a", [{"step": 1}], 2)]):
            with pytest.raises(ValueError, match="at least one with a loss"):
                draw_curves(runs, tmp_path / "c.png")

    def test_smoothing_follows_a_constant_and_has_no_start_up_lag(self) -> None:
        assert curves._smoothed([2.0] * 100) == pytest.approx([2.0] * 100)
        assert curves._smoothed([5.0, *[1.0] * 99])[0] == 5.0


class TestLog:
    def test_a_line_each_at_once(self, tmp_path: Path) -> None:
        log = MetricsLog(tmp_path / "run", tensorboard=False)
        log.write(1, {"loss": torch.tensor(0.5), "step_ms": 3})
        # Read while the log is open: nothing waits in a buffer.
        assert read_log(tmp_path / "run") == [{"step": 1, "loss": 0.5, "step_ms": 3}]
        log.write(2, {"loss": math.nan, "grad_norm": math.inf})
        log.close()
        text = (tmp_path / "run" / "metrics.jsonl").read_text()
        assert json.loads(text.splitlines()[1], parse_constant=pytest.fail) == {
            "step": 2,
            "loss": None,
            "grad_norm": None,
        }

    def test_resuming_keeps_each_step_once(self, tmp_path: Path) -> None:
        with MetricsLog(tmp_path, tensorboard=False) as log:
            for step in range(1, 8):
                log.write(step, {"loss": float(step)})
            log.write(4, {"recall": 0.5})
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 8, "lo')
        assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 4]
        with MetricsLog(tmp_path, resume_step=4, tensorboard=False) as log:
            log.write(5, {"loss": 50.0})
        rows = read_log(tmp_path)
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 4, 5]
        assert rows[-1]["loss"] == 50.0
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]

    def test_a_torn_line_that_happens_to_parse_is_torn_all_the_same(self, tmp_path: Path) -> None:
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
        assert read_log(tmp_path) == [{"step": 1}]

    @pytest.mark.parametrize("line", ["", "torn {", "[1]", '{"loss": 1}', '{"step": "1"}', "\x00"])
    def test_damage_before_the_end_is_named(self, tmp_path: Path, line: str) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
        with pytest.raises(ValueError, match="line 2: expected a JSON object with a step"):
            read_log(path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            read_log(tmp_path)

    def test_only_numbers(self, tmp_path: Path) -> None:
        with (
            MetricsLog(tmp_path, tensorboard=False) as log,
            pytest.raises(ValueError, match="name: expected a number, got 'text'"),
        ):
            log.write(1, {"name": "text"})  # type: ignore[dict-item]
        assert read_log(tmp_path) == []

    def test_tensorboard_has_the_same_names_and_hides_what_was_undone(self, tmp_path: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        with MetricsLog(tmp_path) as log:
            for step in (1, 2, 3):
                log.write(step, {"loss": step, "pairs_per_s": 9.0})
        with MetricsLog(tmp_path, resume_step=2) as log:
            log.write(3, {"loss": 30.0, "pairs_per_s": 9.0})
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert set(events.Tags()["scalars"]) == {"loss", "pairs_per_s"}
        assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 30)]


def figures(name: str, recall: float, **options: Any) -> RunFigures:
    scalars = {
        "image_to_text_recall_at_1": recall,
        "image_to_text_recall_at_1_chance": 0.004,
        "image_to_text_recall_at_10": 0.5,
        "text_to_image_recall_at_1": recall / 2,
        "image_to_text_mean_rank": 7.0,
    }
    return RunFigures(name, scalars, 1024, 812.4, 3 << 29, **options)


class TestTable:
    def test_markdown(self) -> None:
        runs = [
            figures("cached | big", 0.8, plain_memory_bytes=9 << 30),
            figures("chunk", 0.25),
        ]
        assert to_markdown(runs).splitlines() == [
            "|  | cached \\| big | chunk | chance |",
            "|:--|--:|--:|--:|",
            "| R@1 image → text | **80.0 %** | 25.0 % | 0.4 % |",
            "| R@10 image → text | 50.0 % | 50.0 % |  |",
            "| R@1 text → image | **40.0 %** | 12.5 % |  |",
            "| candidates in the softmax | 1,024 | 1,024 |  |",
            "| training pairs per second | 812 | 812 |  |",
            "| peak memory of the process | 1.50 GiB | 1.50 GiB |  |",
            "| tensors of a plain step | 9.00 GiB |  |  |",
        ]

    def test_terminal(self) -> None:
        from rich.console import Console

        console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
        console.print(metrics_table([figures("cached", 0.8), figures("chunk", 0.25)]))
        text = console.export_text()
        console.file.close()
        assert "80.0 %" in text
        assert "R@1 image → text" in text
        assert "tensors of a plain step" not in text

    def test_takes_what_evaluation_gives(self) -> None:
        recall = recall_at_k(torch.eye(5), torch.eye(5), ks=(1, 2)).to_scalars()
        text = to_markdown([RunFigures("x", recall, 5, 1.0, 1)])
        assert "| R@2 text → image | 100.0 % | 40.0 % |" in text

    def test_nothing_to_show(self) -> None:
        for runs in ([], [RunFigures("x", {}, 1, 1.0, 1)]):
            with pytest.raises(ValueError, match="at least one with recall"):
                metrics_table(runs)

    @pytest.mark.parametrize(
        ("count", "text"),
        [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (5 << 40, "5.00 TiB")],
    )
    def test_bytes(self, count: int, text: str) -> None:
        assert format_bytes(count) == text


@pytest.mark.parametrize("module", [table, metrics_log, style])
def test_examples_in_the_docstrings_run(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted >= 1
    assert result.failed == 0
