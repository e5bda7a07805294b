# SPDX-License-Identifier: Apache-2.0
"""The demo engine: speculation, batches and streaming change nothing in what is written."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch

from gdn_portable import DraftProtocol, InputError, bind
from gdn_portable.demo.generate import Generated, Generator, Sampling, Speculation
from gdn_portable.demo.model import WEIGHTS, ByteLm, load_model

MAX_DRAFTS = 5
# more than there are rows, of many lengths
PROMPTS = (
    b"ROMEO\tBut, soft! what light",
    b"O",
    b"to be or not to be, to be or not to be, to be or ",
    b"\xff\x00",
    b"HAMLET\tTo be, or not to be, that is the question:\n\tWhether 'tis nobler in the mind",
    b"KING LEAR\tBlow, winds, and crack your cheeks! Blow, winds, and crack your che",
)
GREEDY, WARM = Sampling(), Sampling(temperature=0.8, seed=7)
SPECULATIONS = {
    "replay chain": Speculation(DraftProtocol.REPLAY, MAX_DRAFTS),
    "snapshot chain": Speculation(DraftProtocol.SNAPSHOT, MAX_DRAFTS),
    "slot table chain": Speculation(DraftProtocol.SLOT_TABLE, MAX_DRAFTS),
    "replay tree of 2": Speculation(DraftProtocol.REPLAY, MAX_DRAFTS, branches=2),
    "replay tree of 3": Speculation(DraftProtocol.REPLAY, MAX_DRAFTS, branches=3),
    "snapshot tree of 2": Speculation(DraftProtocol.SNAPSHOT, MAX_DRAFTS, branches=2),
    "snapshot tree of 3": Speculation(DraftProtocol.SNAPSHOT, MAX_DRAFTS, branches=3),
}
every_speculation = pytest.mark.parametrize(
    "speculation", SPECULATIONS.values(), ids=SPECULATIONS.keys()
)
# frequent words of English, and of the plays
WORDS = """
a about after again all am an and any are art as at away ay be bear been before best better
blood both brother but by call came can cannot come could daughter day dead dear death did do
done dost doth down eye eyes fair false father fear fellow few first fool for forth found friend
friends from gentle give go god gods good grace great had hand hands has hast hath have he head
hear heart heaven heavens her here high him himself his hold home honest honour house how i if
in is it king know lady last lay leave let lie life light like live long look lord love made
madam majesty make man many mark master may me men messenger might mind mine more most mother
much must my myself name nature never new night no noble none nor not nothing now o of off old
on once one or other our out own part peace place play poor power pray prince queen rest right
said same saw say second see servant set shall she should show sir sit sleep so some son soul
speak spirit stand state stay still strange stranger strength strong such sweet take tell than
that the thee their them then there therefore these they thine thing things think this those
thou though thought thousand three thus thy till time tis to together told too true truth two
under unto up upon us very virtue was way we well were what when where which while who whose why
wife will wilt wind with within woman word words world worth would year years yet you young your
youth
"""


@cache
def _model() -> ByteLm:
    return load_model(WEIGHTS, torch.device("cpu"), torch.float32, max_drafts=MAX_DRAFTS)


def _generator(
    max_batch: int = 3, sampling: Sampling = GREEDY, speculation: Speculation | None = None
) -> Generator:
    return Generator(_model(), bind(_model().spec, "cpu"), max_batch, sampling, speculation)


@cache
def _plain(sampling: Sampling) -> list[bytes]:
    return _generator(sampling=sampling).run(PROMPTS, new_bytes=48).texts


@every_speculation
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
def test_speculation_writes_the_same_bytes_as_plain_decoding(
    speculation: Speculation, sampling: Sampling
) -> None:
    written = _generator(sampling=sampling, speculation=speculation).run(PROMPTS, new_bytes=48)

    assert written.texts == _plain(sampling)
    assert [len(text) for text in written.texts] == [48] * len(PROMPTS)


@pytest.mark.parametrize("new_bytes", [1, 2, 3])
@every_speculation
def test_speculation_stops_where_plain_decoding_does(
    speculation: Speculation, new_bytes: int
) -> None:
    written = _generator(speculation=speculation).run(PROMPTS[2:4], new_bytes)

    assert written.texts == [text[:new_bytes] for text in _plain(GREEDY)[2:4]]


@pytest.mark.parametrize("max_batch", [1, 4, 8])
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
def test_the_rest_of_the_batch_does_not_change_a_text(max_batch: int, sampling: Sampling) -> None:
    written = _generator(max_batch, sampling).run(PROMPTS, new_bytes=48)

    assert written.texts == _plain(sampling)


def test_a_sequence_alone_writes_what_it_writes_in_company() -> None:
    alone = [_generator().run([prompt], new_bytes=48).texts[0] for prompt in PROMPTS[:3]]

    assert alone == _plain(GREEDY)[:3]


@pytest.mark.parametrize("protocol", list(DraftProtocol))
def test_a_repetitive_prompt_is_written_several_bytes_at_a_time(protocol: DraftProtocol) -> None:
    speculation = Speculation(protocol, MAX_DRAFTS)

    written = _generator(speculation=speculation).run([PROMPTS[2]], new_bytes=60)

    assert written.accepted_length > 1.2
    assert written.decode_steps < 50


def test_plain_decoding_writes_one_byte_a_step() -> None:
    written = _generator().run(PROMPTS, new_bytes=12)

    assert written.accepted_length == 1
    assert written.prompt_bytes == sum(map(len, PROMPTS))
    assert written.written_bytes == 11 * len(PROMPTS)  # the first comes from the prefill
    assert written.bytes_per_second > 0


@every_speculation
def test_what_is_streamed_is_the_result(speculation: Speculation) -> None:
    streamed = [b""] * len(PROMPTS)

    def listen(number: int, new: bytes) -> None:
        assert new
        streamed[number] += new

    written = _generator(speculation=speculation).run(PROMPTS, new_bytes=20, on_bytes=listen)

    assert streamed == written.texts


def test_a_seed_decides_a_warm_text() -> None:
    texts = [
        _generator(sampling=Sampling(0.8, seed)).run(PROMPTS[:1], new_bytes=40).texts[0]
        for seed in (7, 7, 8)
    ]

    assert texts[0] == texts[1] != texts[2]


def test_a_generator_can_run_again() -> None:
    generator = _generator(speculation=SPECULATIONS["replay chain"])

    first, second = (generator.run(PROMPTS[:2], new_bytes=20).texts for _ in range(2))

    assert first == second


def test_greedy_text_is_made_of_words() -> None:
    prompts = [
        b"ROMEO\tBut, soft! what light through yonder window",
        b"PORTIA\tThe quality of mercy",
    ]

    texts = _generator().run(prompts, new_bytes=80).texts

    words = [word for text in texts for word in re.findall(r"[a-z]{2,}", text.decode().lower())]
    known = [word for word in words if word in WORDS.split()]
    assert len(words) >= 20
    assert len(known) >= len(words) / 2


@pytest.mark.parametrize(
    ("prompts", "problem"),
    [
        ([], "there is no prompt, needs at least one"),
        ([b"a", b""], "prompt 2 is empty, needs at least one byte"),
    ],
)
def test_nothing_to_continue_is_refused(prompts: list[bytes], problem: str) -> None:
    with pytest.raises(InputError) as caught:
        _generator().run(prompts, new_bytes=4)

    assert str(caught.value) == problem


@pytest.mark.parametrize("new_bytes", [0, -3])
def test_nothing_to_write_is_refused(new_bytes: int) -> None:
    with pytest.raises(InputError, match=f"new_bytes is {new_bytes}, needs at least 1"):
        _generator().run(PROMPTS, new_bytes)


@pytest.mark.parametrize(
    ("max_batch", "speculation", "problem"),
    [
        (0, None, "max_batch is 0, needs at least 1"),
        (1, Speculation(max_drafts=1), "max_drafts is 1, needs at least 2"),
        (1, Speculation(branches=0), "branches is 0, needs at least 1"),
        (1, Speculation(DraftProtocol.SLOT_TABLE, branches=2), "a slot table holds a chain"),
    ],
)
def test_an_engine_that_cannot_run_is_refused(
    max_batch: int, speculation: Speculation | None, problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        _generator(max_batch, speculation=speculation)


def test_nothing_written_has_no_rate() -> None:
    written = Generated(texts=[])

    assert written.bytes_per_second == 0
    assert written.accepted_length == 0
