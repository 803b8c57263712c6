"""Pictures that show what is there, a log that survives a kill, and the table for the README."""

from __future__ import annotations

import doctest
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from gradcache_clip.train.evaluation.recall import recall_at_k
from gradcache_clip.train.report import (
    MetricsLog,
    RunCurve,
    RunFigures,
    canvas,
    curves,
    draw_curves,
    draw_gallery,
    draw_similarity,
    format_bytes,
    gallery,
    metrics_log,
    metrics_table,
    read_log,
    similarity,
    table,
    to_markdown,
)

HOSTILE = [
    "",
    "a $ sign and a second $x_{",
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


def squares(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (16, 16), (9 * i % 256, 40, 200)) for i in range(count)]


def pixels(path: Path) -> numpy.ndarray:
    with Image.open(path) as image:
        return numpy.asarray(image.convert("RGB")).astype(int)


def assert_drawn(path: Path) -> None:
    """The picture opens, and a fair part of it is not background."""
    picture = pixels(path)
    assert min(picture.shape[:2]) > 100
    assert (picture != picture[0, 0]).any(2).mean() > 0.005


def count_of(color: str, path: Path) -> int:
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((numpy.abs(pixels(path) - wanted).max(2) <= 2).sum())


@pytest.fixture(autouse=True)
def _untouched_settings() -> Iterator[None]:
    """No picture may change the program's own matplotlib."""
    import sys

    import matplotlib

    pyplot = "matplotlib.pyplot" in sys.modules
    # Reading the settings themselves, other than a copy of them, would choose a backend.
    before = dict(matplotlib.rcParams.copy())
    yield
    assert dict(matplotlib.rcParams.copy()) == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot


class TestSimilarity:
    def brightness_of_cells(self, path: Path, count: int, cell: int) -> Tensor:
        image = torch.from_numpy(pixels(path)).sum(2).float()
        left, top = similarity._LEFT, similarity._TOP
        # Off the middle, where the marks are.
        places = torch.arange(count) * cell + 4
        return image[top + places][:, left + places]

    def test_the_diagonal_is_dark_and_the_rest_is_pale(self, tmp_path: Path) -> None:
        features = torch.eye(24)
        path = draw_similarity(
            features, features, ["x"] * 24, squares(24), tmp_path / "new" / "s.png"
        )
        cells = self.brightness_of_cells(path, 24, 30)
        diagonal = cells.diagonal()
        assert diagonal.max() < 300
        assert (cells + torch.eye(24) * 1000).min() > 600
        assert count_of(similarity._WRONG_PICK, path) < 150

    def test_wrong_pairs_are_framed(self, tmp_path: Path) -> None:
        features = torch.eye(8)
        path = draw_similarity(
            features, features.roll(1, 0), ["x"] * 8, squares(8), tmp_path / "s.png"
        )
        assert count_of(similarity._WRONG_PICK, path) > 500

    def test_look_alikes_become_neighbours(self) -> None:
        centres = normalize(torch.randn(4, 16), dim=1)
        group = torch.randperm(32) % 4
        order = similarity.neighbours_together(centres[group] + 0.05 * torch.randn(32, 16))
        assert sorted(order.tolist()) == list(range(32))
        changes = (group[order].diff() != 0).sum()
        assert changes == 3

    @pytest.mark.parametrize("features", [torch.ones(3, 4), torch.zeros(3, 4), torch.eye(3)])
    def test_degenerate_features(self, tmp_path: Path, features: Tensor) -> None:
        draw_similarity(features, features, ["a", "b", "c"], squares(3), tmp_path / "s.png")
        assert_drawn(tmp_path / "s.png")

    def test_hostile_captions(self, tmp_path: Path) -> None:
        features = torch.randn(len(HOSTILE), 4, requires_grad=True)
        draw_similarity(features, features, HOSTILE, squares(len(HOSTILE)), tmp_path / "s.png")
        assert_drawn(tmp_path / "s.png")

    @pytest.mark.parametrize(
        ("count", "captions", "message"),
        [
            (1, 1, "expected 2 to 48 rows, got 1"),
            (49, 49, "expected 2 to 48 rows, got 49"),
            (5, 4, "captions: expected 5.*got 4"),
        ],
    )
    def test_bad_counts(self, tmp_path: Path, count: int, captions: int, message: str) -> None:
        features = torch.randn(count, 3)
        with pytest.raises(ValueError, match=message):
            draw_similarity(
                features, features, ["x"] * captions, squares(count), tmp_path / "s.png"
            )

    def test_nan(self, tmp_path: Path) -> None:
        features = torch.full((3, 3), math.nan)
        with pytest.raises(ValueError, match="image_features: expected finite"):
            draw_similarity(features, features, ["x"] * 3, squares(3), tmp_path / "s.png")


class TestGallery:
    def draw(self, path: Path, *, right: bool, count: int = 20, **options: int) -> Path:
        features = torch.eye(count)
        # The partner of each is its opposite: the last of all candidates.
        texts = features if right else -features
        ids = torch.arange(count)
        return draw_gallery(
            features, texts, path, images=squares(count), texts=["a dog"] * count,
            image_ids=ids, text_ids=ids, **options,
        )  # fmt: skip

    def test_green_only_where_right(self, tmp_path: Path) -> None:
        good = self.draw(tmp_path / "good.png", right=True)
        bad = self.draw(tmp_path / "bad.png", right=False)
        assert count_of(canvas.RIGHT, good) > 12 * 300
        assert count_of(canvas.RIGHT, bad) == 0

    def test_what_is_found(self) -> None:
        queries, candidates = torch.eye(4), torch.eye(4)[[1, 0, 2, 3]]
        ids = torch.arange(4)
        generator = torch.Generator().manual_seed(0)
        answers = gallery.best_answers(
            queries, ids, candidates, ids, rows=9, depth=2, generator=generator
        )
        assert sorted(answer.query for answer in answers) == [0, 1, 2, 3]
        for answer in answers:
            assert answer.found[0] == [1, 0, 2, 3][answer.query]
            assert answer.right == [answer.query > 1, False] or answer.query < 2
            assert answer.rank == (1 if answer.query > 1 else 4)
            assert answer.scores[0] == 1.0

    def test_fewer_than_asked_for(self, tmp_path: Path) -> None:
        assert_drawn(self.draw(tmp_path / "one.png", right=True, count=1))

    def test_same_seed_same_picture(self, tmp_path: Path) -> None:
        first = self.draw(tmp_path / "1.png", right=True, rows=2, depth=1, seed=1).read_bytes()
        assert (
            self.draw(tmp_path / "2.png", right=True, rows=2, depth=1, seed=1).read_bytes() == first
        )
        assert (
            self.draw(tmp_path / "3.png", right=True, rows=2, depth=1, seed=2).read_bytes() != first
        )

    def test_hostile_captions_and_images_of_any_kind(self, tmp_path: Path) -> None:
        images: list[Any] = [
            torch.rand(3, 5, 90),
            torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8),
            torch.rand(1, 8, 8) * 9 - 4,
            torch.full((4, 3, 3), math.nan),
            Image.new("RGBA", (10, 300), (255, 0, 0, 60)),
            Image.new("L", (1, 1)),
            Image.new("P", (40, 30)),
            Image.new("1", (40, 30)),
            numpy.zeros((30, 40, 3), dtype=numpy.uint8),
            numpy.zeros((30, 40), dtype=numpy.uint8),
            Image.new("CMYK", (40, 30)),
            torch.rand(3, 1, 1, dtype=torch.float16),
        ]
        features, ids = torch.randn(len(images), 3), torch.arange(len(images))
        draw_gallery(
            features, features.roll(3, 0), tmp_path / "g.png", images=images, texts=HOSTILE,
            image_ids=ids, text_ids=ids, rows=len(images), depth=2,
        )  # fmt: skip
        assert_drawn(tmp_path / "g.png")

    def test_a_program_that_uses_tex_is_no_obstacle(self, tmp_path: Path) -> None:
        import matplotlib

        with matplotlib.rc_context({"text.usetex": True, "font.family": ["serif"]}):
            assert_drawn(self.draw(tmp_path / "g.png", right=True, rows=1))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rows": 0}, "rows, depth"),
            ({"depth": 6}, "rows, depth"),
            ({"texts": ["a"]}, "texts: expected 3.*got 1"),
            ({"image_ids": torch.arange(2)}, "image_ids: expected 3"),
        ],
    )
    def test_bad_input(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        arguments: dict[str, Any] = {
            "images": squares(3),
            "texts": ["a"] * 3,
            "image_ids": torch.arange(3),
            "text_ids": torch.arange(3),
        }
        with pytest.raises(ValueError, match=message):
            draw_gallery(torch.eye(3), torch.eye(3), tmp_path / "g.png", **(arguments | changes))


class TestText:
    def test_signs_that_the_font_lacks(self) -> None:
        assert canvas.printable("dog \N{DOG FACE}") == "dog \N{WHITE VERTICAL RECTANGLE}"
        assert canvas.printable("a\n b\u200d\x00\ue000") == "a b"

    def test_clipping_is_as_long_as_fits(self) -> None:
        page = canvas.Page(200, 50)
        assert page._clipped("short", 100, 10, "normal") == "short"
        clipped = page._clipped("a rather long caption of a picture", 100, 10, "normal")
        assert clipped.endswith("…")
        assert 10 < len(clipped) < 20
        assert page._clipped("anything", 0, 10, "normal") == "…"


class TestImages:
    def test_shape_is_kept_and_small_ones_stay_sharp(self) -> None:
        image = torch.tensor([[[0, 255]]], dtype=torch.uint8).expand(3, 1, 2)
        found = canvas.fitted(image, 80)
        assert found.shape == (40, 80, 3)
        assert set(found.flatten().tolist()) == {0, 255}

    def test_transparent_becomes_white(self) -> None:
        assert (canvas.fitted(Image.new("RGBA", (9, 9), (0, 0, 0, 0)), 9) == 255).all()

    def test_wrong_shape(self) -> None:
        with pytest.raises(ValueError, match=r"images: expected.*got \(8, 8, 3\)"):
            canvas.fitted(torch.zeros(8, 8, 3), 9)


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
    def figure_of(self, monkeypatch: pytest.MonkeyPatch, runs: list[RunCurve]) -> Any:
        drawn: list[Any] = []
        monkeypatch.setattr(
            curves, "save_figure", lambda figure, path: (drawn.append(figure), path)[1]
        )
        draw_curves(runs, "unused.png")
        return drawn[0]

    def test_says_the_finding_and_shows_each_level_of_guessing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runs = [
            RunCurve("cached", rows_of_a_run(100, 1024), 1024),
            RunCurve("chunk", rows_of_a_run(50, 64), 64),
        ]
        figure = self.figure_of(monkeypatch, runs)
        assert figure.get_suptitle() == "Held-out recall@1: 15.0 % (cached) against 7.5 % (chunk)"
        loss, accuracy, recall = figure.axes
        constant = {round(line.get_ydata()[0], 4) for line in loss.lines if line.get_ls() == ":"}
        levels = {round(float(line.get_ydata()[0]), 4) for line in loss.lines}
        assert constant <= {6.9315, 4.1589} <= levels
        assert {100 / 1024, 100 / 64} <= {float(line.get_ydata()[0]) for line in accuracy.lines}
        assert len([line for line in recall.lines if len(line.get_xdata()) in (20, 10)]) == 4
        for axes in (loss, accuracy, recall):
            assert axes.get_xlabel() == "optimizer step"
            assert axes.get_ylabel()

    def test_a_loss_that_is_no_softmax_has_a_level_of_its_own(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        figure = self.figure_of(monkeypatch, [RunCurve("a", rows_of_a_run(9, 64), 64, guess=5.15)])
        loss = figure.axes[0]
        assert 5.15 in {float(line.get_ydata()[0]) for line in loss.lines}
        assert "dotted: guessing, 5.15" in {text.get_text() for text in loss.texts}

    def test_gaps_and_one_point_and_no_evaluation(self, tmp_path: Path) -> None:
        rows = [{"step": 1, "loss": None}, {"step": 2, "loss": 3.0}, {"step": 3, "loss": math.nan}]
        path = draw_curves([RunCurve("a", rows, 2)], tmp_path / "c.png")
        assert pixels(path).shape == (470, 1320, 3)
        assert count_of(canvas.MAIN, path) > 5

    def test_nothing_to_draw(self, tmp_path: Path) -> None:
        for runs in ([], [RunCurve("a", [], 2)], [RunCurve("a", [{"step": 1}], 2)]):
            with pytest.raises(ValueError, match="at least one with a loss"):
                draw_curves(runs, tmp_path / "c.png")

    def test_smoothing_follows_a_constant_and_has_no_start_up_lag(self) -> None:
        assert curves._smoothed([2.0] * 100) == pytest.approx([2.0] * 100)
        assert curves._smoothed([5.0, *[1.0] * 99])[0] == 5.0

    def test_hostile_names(self, tmp_path: Path) -> None:
        runs = [RunCurve(name, rows_of_a_run(3, 8), 8) for name in ("a $ b $ c_{", "_hidden")]
        assert_drawn(draw_curves(runs, tmp_path / "c.png"))


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


@pytest.mark.parametrize("module", [table, metrics_log])
def test_examples_in_the_docstrings_run(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted >= 1
    assert result.failed == 0


def test_no_picture_warns(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        features = torch.randn(4, 3)
        draw_similarity(features, features, HOSTILE[2:6], squares(4), tmp_path / "s.png")
    assert not caught
