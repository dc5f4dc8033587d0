"""How machine code is counted, and what the hot loops of the GPU kernels may cost."""

import re

import pytest

from rabit_jax.errors import BadInput
from rabit_jax.kernels.bench import aot, sass

# A prologue, a loop of 12 instructions with 2 tensor instructions around one of 3 with none, and
# the branch to itself that ends every program.
TEXT = """
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;  /* 0x00000a00ff017624 */
                                                                            /* 0x000fc400078e00ff */
        /*0010*/                   LDG.E R2, [R2.64] ;                      /* 0x0000000402027981 */
        /*0020*/                   LDG.E.128 R4, [R12.64] ;                 /* 0x0000000402027981 */
        /*0030*/              @!P1 LDGSTS.E.BYPASS.128 [R20], [R14.64+0x100] ;
        /*0040*/                   LOP3.LUT R8, R4, 0x1010101, RZ, 0xc0, !PT ;
        /*0050*/                   SHF.R.U32.HI R9, RZ, 0x4, R5 ;
        /*0060*/                   IADD3 R12, P0, R12, 0x80, RZ ;
        /*0070*/               @P0 BRA 0x0050 ;
        /*0080*/                   IMAD.X R13, RZ, RZ, R13, P0 ;
        /*0090*/                   IMAD.U32 R7, RZ, RZ, UR4 ;
        /*00a0*/                   BMMA.168256.AND.POPC R24, R8.ROW, R4.COL, R24 ;
        /*00b0*/                   BMMA.168256.AND.POPC R28, R8.ROW, R6.COL, R28 ;
        /*00c0*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*00d0*/               @P1 BRA 0x0020 ;
        /*00e0*/                   STG.E [R2.64], R24 ;
        /*00f0*/                   EXIT ;
        /*0100*/                   BRA 0x0100 ;
"""


def test_instructions_are_parsed_with_their_predicates_left_out():
    found = sass.parse(TEXT)
    assert len(found) == 17
    assert found[3] == (0x30, "LDGSTS.E.BYPASS.128", "[R20], [R14.64+0x100]")


def test_the_hot_loop_is_counted_by_class():
    loop = sass.hot_loop(sass.parse(TEXT))
    assert (loop[0].address, loop[-1].address) == (0x20, 0xD0)
    assert sass.count(loop) == {"global": 2, "logic": 2, "address": 2, "control": 2, "move": 1,
                                "tensor": 2, "uniform": 1}


def test_per_bit_is_warp_instructions_times_lanes_over_signs():
    row = sass.measure(sass.Compiled(sass.parse(TEXT), 40, 16, ""), 512)
    assert row["instructions_per_bit"] == 12 * 32 / 1024
    assert row["integer_per_bit"] == 4 * 32 / 1024
    assert row["classes"]["logic"] == 2 * 32 / 1024
    assert (row["registers"], row["spills"]) == (40, 16)
    assert row["tensor_instruction"] == "BMMA.168256.AND.POPC"
    with pytest.raises(ValueError, match="wanted one kind"):
        sass.measure(sass.Compiled(sass.parse(TEXT)[:8], 40, 0, ""), 512)


def test_the_width_of_loads_is_that_of_the_narrowest_that_matter():
    assert sass.load_bits(sass.hot_loop(sass.parse(TEXT))) == 128
    # One load of 32 bits of 288 is more than a sixteenth.
    assert sass.load_bits(sass.parse(TEXT)) == 32
    assert sass.load_bits(sass.parse(TEXT.replace("LDG.E.128", "LDG.E.U8"))) == 32
    assert sass.load_bits(sass.parse(TEXT.replace("LDG.E.128", "LDG.E.64"))[2:]) == 64


def test_a_program_without_a_loop_is_counted_whole():
    text = re.sub(r"@P. BRA", "NOP", TEXT)
    assert len(sass.hot_loop(sass.parse(text))) == 17


@pytest.fixture(scope="module")
def rows():
    """Every kernel for an RTX 4090 and an H200."""
    return aot.report(["sm_89", "sm_90"])


def told(row):
    """What a failed target says: the whole row."""
    return f"{row['kernel']} misses its target:\n{row}"


def of(rows, name):
    found = [row for row in rows if row["kernel"].startswith(name)]
    assert {row["arch"] for row in found} == {"sm_89", "sm_90"}, f"no rows of {name}"
    return found


def test_the_one_bit_product_decodes_nothing(rows):
    for row in of(rows, "triton_b1"):
        assert row["instructions_per_bit"] <= 0.25, told(row)
        # The loop is unrolled, so what comes before and after it counts too.
        decoding = sum(row["classes"].get(c, 0) for c in ("logic", "convert", "float", "shared"))
        assert decoding <= 0.03, told(row)
        assert row["tensor_instruction"].startswith("BMMA"), told(row)


def test_the_int8_product_masks_and_little_else(rows):
    for row in of(rows, "triton_int8"):
        assert row["instructions_per_bit"] <= 0.80, told(row)
        assert row["integer_per_bit"] <= 0.35, told(row)
        assert row["tensor_instruction"].startswith(("IMMA", "IGMMA")), told(row)


def test_more_columns_take_a_shift_for_all_bits_at_once():
    # 32 columns: one instruction of Hopper multiplies 16 rows of 32 inputs per warp by all of them.
    row = sass.measure(aot.compile_triton("triton_int8", 2, 90, batch=16), 16 * 32)
    assert row["classes"]["logic"] < 0.29 and row["spills"] == 0, row


def test_no_kernel_spills_and_loads_are_wide(rows):
    for row in rows:
        assert row["spills"] == 0, told(row)
        # Tiles of 128 rows, which an H200 multiplies fastest, are read in 8 bytes by each thread.
        least = 64 if row["kernel"].startswith("triton_int8") else 128
        assert row["load_bits"] >= least, told(row)


def test_the_report_has_a_row_for_every_kernel(rows):
    names = {row["kernel"].split()[0] for row in rows}
    assert names == {"triton_b1", "triton_int8", "pallas_b1", "pallas_int8"}
    assert all(set(aot.COLUMNS) | {"classes"} == set(row) for row in rows)


def test_an_unknown_architecture_is_bad_input():
    with pytest.raises(BadInput, match="'H200' is no architecture"):
        aot.report(["H200"])
