"""The cycle model: rates on counts that are known, and the marks on what is compiled."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from cycle_model import CARDS, launch_ms, tile_time, unit_cycles, vendor_tflop_per_s
from machine_code import _parts
from predicted import Prediction, missed_marks

HOPPER, AMPERE, ADA = CARDS[0], CARDS[1], CARDS[2]
HERE = Path(__file__).parent


def test_peaks_are_those_of_the_papers() -> None:
    peaks = {card.name: round(card.peak_tflop_per_s) for card in CARDS}
    assert peaks == {"H100 SXM": 989, "A100 SXM 80 GB": 312, "RTX 4090": 165, "RTX 5090": 210}


@pytest.mark.parametrize(("n", "share"), [(64, 0.57), (128, 0.80)])
def test_hopper_products_wait_for_shared_memory(n: int, share: float) -> None:
    """A step of 16 features of 128 x n, eight warps: operands are written and read there."""
    product = [("HGMMA.64", f"x{n}x16.F32.BF16 R24, gdesc[UR8], R24")]
    # 16 bytes a lane and 256 lanes.
    copies = [("LDGSTS.E.BYPASS.128", "")] * ((128 + n) // 64)
    cycles = unit_cycles(HOPPER, product, 8)
    loaded = unit_cycles(HOPPER, copies, 8)["shared"] / 2
    assert cycles["matrix"] == 2 * 64 * n * 16 / 2048
    assert cycles["matrix"] / (cycles["shared"] + loaded) == pytest.approx(share, abs=0.02)


def test_units_by_hand() -> None:
    code = [("MUFU.EX2", ""), ("SHFL.BFLY", ""), ("FFMA", ""), ("STG.E.128", ""), ("LDS.64", "")]
    cycles = unit_cycles(AMPERE, code, 4)
    assert (cycles["special"], cycles["shuffle"], cycles["fp32"]) == (8, 4, 2)
    assert cycles["shared"] == 4 * 4 + 4 * 2 and cycles["issue"] == 5
    assert cycles["L2"] == pytest.approx(4 * 512 / (5120 / 108))
    assert unit_cycles(ADA, [("HMMA.16816.F32", "")], 1)["matrix"] == 2048 / 256


def test_two_blocks_overlap_and_one_does_not() -> None:
    loop, rest = [("HMMA.16816.F32", "")] * 8, [("MUFU.EX2", "")] * 64
    given = {"steps": 4, "warps": 8, "flops": 1e6}
    one, two = (tile_time(ADA, loop, rest, blocks=n, **given) for n in (1, 2))
    assert one.cycles == 4 * 8 * 8 * 8 + 64 * 8 * 2 and two.cycles == 4 * 8 * 8 * 8
    assert (one.unit, two.unit) == ("matrix, then special", "matrix")


def test_launches_take_whole_waves_and_their_bytes() -> None:
    tile = tile_time(ADA, [("HMMA.16816.F32", "")], [], steps=1, warps=8, blocks=1, flops=1.0)
    assert launch_ms(ADA, tile, 129, 1, 0) == pytest.approx(2 * launch_ms(ADA, tile, 128, 1, 0))
    assert launch_ms(ADA, tile, 1, 1, 1.01e9) == pytest.approx(1.0)
    assert 750 < vendor_tflop_per_s(HOPPER) < 850


def test_what_a_tile_executes() -> None:
    """The main loop; what most tiles skip; and an epilogue in a loop of its own."""
    listing = """
        /*0000*/ MOV R1, c[0x0][0x28] ;
        /*0010*/ HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0020*/ @P0 BRA 0x10 ;
        /*0030*/ MUFU.EX2 R4, R4 ;
        /*0040*/ @!P1 BRA 0x60 ;
        /*0050*/ FSEL R4, R4, RZ, P2 ;
        /*0060*/ @!P1 STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0070*/ @P3 BRA 0x30 ;
        /*0080*/ EXIT ;
        /*0090*/ BRA 0x90;
    """
    *parts, continues = _parts(listing)
    loop, rest, once = ([op for op, _ in part] for part in parts)
    assert loop == ["HMMA.16816.F32", "BRA"] and not continues
    assert rest == ["MOV", "MUFU.EX2", "BRA", "FSEL", "STG.E.U16", "BRA", "EXIT", "BRA"]
    assert once == ["MOV", "MUFU.EX2", "BRA", "STG.E.U16", "BRA", "EXIT", "BRA"]


def test_a_loop_over_tiles() -> None:
    """A step skips what ends a tile, and that skips what most tiles do."""
    listing = """
        /*0000*/ MOV R1, c[0x0][0x28] ;
        /*0010*/ HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0020*/ @P0 BRA 0x70 ;
        /*0030*/ MUFU.EX2 R4, R4 ;
        /*0040*/ @!P1 BRA 0x60 ;
        /*0050*/ FSEL R4, R4, RZ, P2 ;
        /*0060*/ STG.E.128 desc[UR4][R2.64], R4 ;
        /*0070*/ @P3 BRA 0x10 ;
        /*0080*/ EXIT ;
    """
    *parts, continues = _parts(listing)
    loop, rest, once = ([op for op, _ in part] for part in parts)
    assert loop == ["HGMMA.64", "BRA", "BRA"] and continues
    assert rest == ["MOV", "MUFU.EX2", "BRA", "FSEL", "STG.E.128", "EXIT"]
    assert once == ["MUFU.EX2", "BRA", "STG.E.128"]


def test_loads_ahead_hide_behind_the_epilogue() -> None:
    """Four steps of 128 x 256, 1,267 cycles of the L2 each; 1,024 of products; 2,048 of exp2."""
    loop = [("HGMMA.64", "x256x16.F32.BF16 R24")] * 4 + [("UTMALDG.2D", "")] * 2
    given = {"steps": 4, "warps": 8, "blocks": 1, "flops": 1e6, "box_bytes": 192 * 64 * 2}
    alone, ahead, far = (
        tile_time(HOPPER, loop, [("MUFU.EX2", "")] * 128, **given, ahead=n) for n in (0, 1, 3)
    )
    step = 384 * 128 / (5120 / 132)
    assert alone.cycles == pytest.approx(4 * step + 2048)
    assert ahead.cycles == pytest.approx(4 * 1024 + 2048) and far.cycles == ahead.cycles
    stored = [("MUFU.EX2", "")] * 128 + [("STG.E.128", "")] * 64
    bound = tile_time(HOPPER, loop, stored, **given, ahead=3)
    assert bound.cycles == pytest.approx(4 * step + 64 * 4096 / (5120 / 132)) and bound.unit == "L2"


def test_descriptors_load_whole_boxes() -> None:
    """Two boxes of 128 and 256 rows of 64 features; one thread asks for them."""
    cycles = unit_cycles(HOPPER, [("UTMALDG.2D", "")] * 2, 8, (128 + 256) / 2 * 64 * 2)
    assert cycles["shared"] == 384 * 128 / 128
    assert cycles["L2"] == pytest.approx(384 * 128 / (5120 / 132))


def test_missed_marks_are_named() -> None:
    reached = [
        Prediction("CLIP", "H100 SXM", 768, 47.0, 560, "8 B^2 D", "", 0),
        Prediction("sigmoid", "H100 SXM", 768, 40.0, 495, "6 B^2 D", "", 0),
        Prediction("CLIP", "RTX 4090", 768, 188.0, 140, "8 B^2 D", "", 0),
    ]
    assert missed_marks(reached) == []
    slower = [replace(each, ms=each.ms + 1, tflop_per_s=each.tflop_per_s - 1) for each in reached]
    assert len(missed_marks(slower)) == 3 and "559 of 560" in missed_marks(slower)[0]


@pytest.mark.slow
def test_predictions_of_what_is_compiled_reach_the_marks() -> None:
    script = HERE.parent / "benchmarks" / "kernel_resources.py"
    command = [sys.executable, str(script), "--predict", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| CLIP | H100 SXM | 768 |" in done.stdout


@pytest.mark.slow
def test_descriptors_and_sums_over_stacked_warps_pay() -> None:
    """Without either, statistics would be at most a fifth faster than by pointers."""
    assert statistics_rate() > 1.25 * statistics_rate("--pointers")


def statistics_rate(*options: str) -> float:
    """Predicted TFLOP/s of the statistics of CLIP on the H100 at D = 768."""
    script = HERE.parent / "benchmarks" / "kernel_resources.py"
    wanted = "--tiles", "--architecture", "90", "--variant", "plain"
    command = [sys.executable, str(script), *wanted, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (row,) = (line for line in done.stdout.splitlines() if " statistics " in line)
    return float(row.split("│")[6])
