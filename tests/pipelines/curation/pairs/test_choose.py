"""The rule of cross pairs, on candidates that are made here. Run: python -m pytest tests/pipelines/curation/pairs"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built import jpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_server import Reply, openai_server

from domainshuttle.pipelines.corpora.masks import encode_rle
from domainshuttle.pipelines.curation.pairs.candidates import Candidate, CandidateStore, Found
from domainshuttle.pipelines.curation.pairs.choose import Chosen, NoSubject, choose
from domainshuttle.pipelines.curation.pairs.config import PairConfig, PairModels, PairPool, fit_pools
from domainshuttle.pipelines.curation.pairs.quality import judge_pair
from domainshuttle.pipelines.endpoints.client import ChatClient, EndpointError
from domainshuttle.pipelines.endpoints.config import EndpointConfig
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.quarantine import fault_kind
from domainshuttle.pipelines.sample import Reference, SampleInfo, Subject

MODELS = PairModels(detector="/d", segmenter="/s", dino="/v", clip="/c")
SIZE = (80, 120)


def config(**changes: Any) -> PairConfig:
    return PairConfig(models=MODELS, **{"least_side": 8, "least_clip": 0.55, **changes})


def at(cosine: float, side: float = 1.0) -> np.ndarray:
    """A vector of this similarity to (1, 0, 0); those of another `side` are less alike each other."""
    rest = np.sqrt(1 - cosine**2)
    return np.array([cosine, rest * np.cos(side), rest * np.sin(side)], np.float32)


def seen(
    word: str = "dog", frame: int = 0, look: float | np.ndarray = 1.0, left: int = 10, **changes: Any
) -> Candidate:
    vector = at(look, frame + left) if isinstance(look, float) else look.astype(np.float32)
    mask = np.zeros(SIZE, bool)
    mask[20:60, left : left + 30] = True
    known: dict[str, Any] = {
        "word": word, "place": "target", "frame": frame, "box": (left, 20, left + 30, 60), "detection": 0.9,
        "counts": encode_rle(mask), "size": SIZE, "mask_score": 0.95, "area": float(mask.mean()),
        "picture": f"{word}{frame}{left}".encode(), "picture_size": (40, 30), "dino": vector, "clip": vector,
    }  # fmt: skip
    return Candidate(**{**known, **changes})


def found(*candidates: Candidate, key: str = "own", video: str = "v") -> Found:
    return Found(f"n-{key}", key, video, candidates)


def sample(*words: str, references: int = 0, **changes: Any) -> SampleInfo:
    domains = {"beach": 3}
    return SampleInfo(
        caption="It is.", source="mine", kind="video", fps=8, frames=20, size=SIZE,
        subjects=[Subject(id=n, word=word, domain=domains.get(word, 1)) for n, word in enumerate(words)],
        references=[Reference(file=f"ref{n}.png", subject=0, origin="photo", size=(40, 30)) for n in range(references)],
        **changes,
    )  # fmt: skip


def pictures(chosen: Chosen) -> list[tuple[int, str, bytes]]:
    return [(one.subject, one.origin, chosen.files.get(one.file, b"")) for one in chosen.info.references]


def rejected(chosen: Chosen) -> dict[tuple[str, int], str]:
    return {(one.clip or "own", one.place): fault_kind(one.rejected) for one in chosen.outcomes if not one.reference}


def test_pictures_of_other_clips_come_first_then_the_most_similar_ones() -> None:
    own = found(seen(), seen(frame=5, look=0.8), seen(frame=9, look=0.9), seen(frame=12, look=0.85))
    other = found(seen(frame=3, look=0.6, picture=b"other"), key="clip2")
    chosen = choose(sample("dog"), own, [other], config(pictures=3))
    assert pictures(chosen) == [(0, "same_clip", b"dog010"), (0, "other_clip", b"other"), (0, "same_clip", b"dog910")]
    assert rejected(chosen) == {("own", 1): "not needed", ("own", 3): "not needed"}
    assert chosen.info.scores == {"pair_dino": pytest.approx(0.6), "pair_clip": pytest.approx(0.6)}
    assert chosen.pairs == 2 and chosen.info.references[1].size == (40, 30)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"look": 0.99}, "near-duplicate"), ({"look": 0.3}, "another subject"), ({"mask_score": 0.5}, "uncertain mask"),
        ({"look": 0.8, "clip": at(0.5)}, "another kind of thing"), ({"area": 0.001}, "small"),
        ({"area": 0.95}, "large"), ({"picture_size": (40, 4)}, "few pixels"), ({"picture": b"", "area": 0.0}, "small"),
    ],
)  # fmt: skip
def test_what_is_no_pair_is_rejected_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    chosen = choose(sample("dog"), found(seen(), seen(frame=5, **changes)), [], config())
    assert rejected(chosen) == {("own", 1): reason}
    assert len(chosen.info.references) == 1 and not chosen.pairs and "pair_dino" not in chosen.info.scores
    line = json.loads(json.dumps([one.trace() for one in chosen.outcomes]))
    assert line[0]["reference"] == "ref0.jpg" and fault_kind(line[1]["rejected"]) == reason


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**31))
def test_subjects_of_one_word_are_assigned_as_brute_force_does(subjects: int, instances: int, seed: int) -> None:
    random = np.random.default_rng(seed)

    def unit(count: int) -> np.ndarray:
        vectors = np.abs(random.normal(size=(count, 8)))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    anchors, others = unit(subjects), unit(instances)
    own = found(*(seen("man", 0, vector, left=30 * n) for n, vector in enumerate(anchors)))
    other = found(*(seen("man", 4, vector, left=20 * n) for n, vector in enumerate(others)), key="clip2")
    chosen = choose(sample(*["man"] * subjects), own, [other], config(least_dino=0, least_clip=0, most_dino=1))
    given_ = {one.place: one.subject for one in chosen.outcomes if one.clip and one.subject is not None}
    likeness = anchors @ others.T
    best = max(
        sum(likeness[a, b] for a, b in zip(rows, columns, strict=True))
        for rows in itertools.permutations(range(subjects), min(subjects, instances))
        for columns in itertools.combinations(range(instances), min(subjects, instances))
    )
    assert sum(likeness[subject, place] for place, subject in given_.items()) == pytest.approx(best, abs=1e-5)
    assert len(set(given_.values())) == len(given_) == min(subjects, instances)


def test_one_thing_under_two_words_is_one_subject() -> None:
    own = found(seen("person"), seen("woman"), seen("person", 5, 0.8), seen("woman", 5, 0.8), seen("cup", left=70))
    chosen = choose(sample("person", "woman", "cup"), own, [], config())
    assert [subject.word for subject in chosen.info.subjects] == ["person", "cup"]
    assert [one.subject for one in chosen.info.references] == [0, 0, 1] and chosen.missing == ["woman"]
    assert rejected(chosen)["own", 1] == "same thing as another subject"


def test_references_of_a_sample_stay_or_are_made_anew() -> None:
    given_ = seen(place="reference", picture=b"", counts="", area=1.0)
    own = found(seen(frame=2, look=0.8), given_, seen("cup", 2, left=70), seen("cup", 7, 0.8))
    chosen = choose(sample("dog", "cup", references=1), own, [], config())
    files = [(one.file, one.subject) for one in chosen.info.references]
    assert files == [("ref0.png", 0), ("ref1.jpg", 0), ("ref2.jpg", 1), ("ref3.jpg", 1)]
    assert set(chosen.files) == {"ref1.jpg", "ref2.jpg", "ref3.jpg"}
    anew = found(*(one for one in own.candidates if one.place != "reference"))
    chosen = choose(sample("dog", "cup", references=1), anew, [], config(references="anew"))
    assert [one.file for one in chosen.info.references] == ["ref0.jpg", "ref1.jpg", "ref2.jpg"]


def test_an_edited_clip_has_subjects_of_the_clip_it_was_made_of() -> None:
    info = sample("dog", "beach", source_clip="source.mp4")
    whole = {"place": "source", "counts": "", "area": 1.0}
    own = found(seen(place="source"), seen(place="source", frame=9, look=0.8), seen("beach", **whole),
                seen("beach", 9, 0.7, **whole))  # fmt: skip
    chosen = choose(info, own, [], config())
    assert [(subject, origin) for subject, origin, _ in pictures(chosen)] == [(0, "edited")] * 2 + [(1, "edited")] * 2
    assert chosen.info.source_clip is None
    assert not choose(sample("dog"), found(seen(), video="v"), [own], config()).pairs  # such clips are no others


def test_other_clips_name_things_in_other_words() -> None:
    own = found(seen("a man in a red shirt"), seen("a man with a hat", left=70, look=0.1))
    other = found(seen("the man who speaks", 3, 0.12, picture=b"hat"), seen("a man on a horse", 3, 0.9, left=60),
                  seen("a cup", 3, 0.9), key="clip2")  # fmt: skip
    chosen = choose(sample("a man in a red shirt", "a man with a hat"), own, [other], config(most_dino=1))
    taken = {data: subject for subject, origin, data in pictures(chosen) if origin == "other_clip"}
    assert taken[b"a man on a horse360"] == 0
    assert all(one.candidate.word != "a cup" for one in chosen.outcomes)


def test_samples_without_subjects_are_asked_for_words_and_those_without_pictures_are_left_out() -> None:
    asked = config(words=["dog", "dragon"])
    chosen = choose(sample(), found(seen(), seen("dragon", left=60)), [], asked)
    assert [(one.word, one.domain) for one in chosen.info.subjects] == [("dog", 1), ("dragon", 2)]
    assert chosen.info.scores["domains_from_words"] == 1
    with pytest.raises(NoSubject, match="no subject: none of 'dog' has 1 pictures") as none:
        choose(sample("dog"), found(seen(area=0.001)), [], config())
    assert [fault_kind(one["rejected"]) for one in none.value.trace] == ["small"]
    with pytest.raises(NoSubject, match="names none, and no words are asked"):
        choose(sample(), found(), [], config())
    with pytest.raises(NoSubject, match="none of 'dog' has 2 pictures"):
        choose(sample("dog"), found(seen()), [], config(least_pictures=2))


def test_a_quality_filter_declines_in_three_ways_and_the_next_candidate_is_asked(tmp_path: Path) -> None:
    replies = {
        b"another": '{"same_subject": false, "score": 4, "reason": "another dog"}',
        b"blurred": '{"same_subject": true, "score": 1.5, "reason": "blurred"}',
        b"odd": '{"same": 1}',
        b"refused": "I'm sorry, I can't help with that.",
        b"good": '{"same_subject": true, "score": 3.5, "reason": "sharp"}',
    }
    data = {name: jpeg(number) for number, name in enumerate(replies)}

    def answer(request: dict[str, Any], _: int) -> Reply:
        import base64

        urls = [part["image_url"]["url"] for part in request["messages"][1]["content"] if "image_url" in part]
        shown = base64.b64decode(urls[1].partition(",")[2])
        return Reply(next(text for name, text in replies.items() if data[name] == shown))

    looks = {b"another": 0.9, b"blurred": 0.85, b"odd": 0.8, b"refused": 0.75, b"good": 0.7}
    candidates = [seen(frame=n, look=look, picture=data[name]) for n, (name, look) in enumerate(looks.items(), 1)]
    own = found(seen(picture=jpeg(200)), *candidates)
    with openai_server(answer) as server, ChatClient(EndpointConfig(url=server.url, model="m"), tmp_path) as client:
        chosen = choose(sample("dog"), own, [], config(pictures=2), lambda *asked: judge_pair(client, 3.0, *asked))
        again = choose(sample("dog"), own, [], config(pictures=2), lambda *asked: judge_pair(client, 3.0, *asked))
    assert [*rejected(chosen).values()] == [
        "another subject for the quality filter", "low quality", "bad answer of the quality filter",
        "refused by the quality filter",
    ]  # fmt: skip
    assert chosen.files["ref1.jpg"] == data[b"good"] and chosen.info.scores["pair_quality"] == 3.5
    assert again.info == chosen.info and len(server.requests) == 5 + 2  # a bad answer was asked for three times


def test_an_endpoint_that_is_none_ends_with_one_message(tmp_path: Path) -> None:
    with openai_server(lambda *_: Reply(body=b"<html>hello</html>")) as server:
        asked = EndpointConfig(url=server.url, model="m", patience=30)
        with ChatClient(asked, tmp_path) as client, pytest.raises(EndpointError, match="does not speak OpenAI"):
            judge_pair(client, 3.0, "dog", jpeg(1), jpeg(2))


def test_candidates_are_kept_as_they_were_found_and_clips_of_a_video_are_found(tmp_path: Path) -> None:
    store = CandidateStore(tmp_path)
    clips = [found(seen(frame=n, look=0.5), seen("cup", n), key=f"k{n}", video="v" if n < 4 else "") for n in range(5)]
    store.write(clips[:2])
    store.write(clips[2:])
    (tmp_path / ".x.partial").write_bytes(b"torn")
    kept = store.gather(one.name for one in clips)
    for one in clips:
        back = kept.find(one.name)
        assert back is not None and (back.key, back.video, back.fault) == (one.key, one.video, "")
        for had, has in zip(one.candidates, back.candidates, strict=True):
            for name in Candidate.__slots__:
                np.testing.assert_allclose(getattr(had, name), getattr(has, name), 1e-6) if name not in (
                    "word", "place", "counts", "picture") else None  # fmt: skip
                assert name not in ("word", "place", "counts", "picture") or getattr(had, name) == getattr(has, name)
    assert kept.boxes == 10 and len(kept) == 5 and kept.find("nobody") is None
    assert [one.key for one in kept.beside("n-k2", 2)] == ["k3", "k0"] and not kept.beside("n-k4", 2)
    named = store.gather((one.name for one in clips), "(k)[24]")  # of those that name none
    assert [one.key for one in named.beside("n-k4", 4)] == [] and named.scenes == 0
    fewer = store.gather(["n-k0", "n-k3"])  # the others are in the corpus no more
    assert [one.key for one in fewer.beside("n-k0", 4)] == ["k3"] and len(store.open()) == 2


def test_pools_fit_the_cluster_all_at_the_same_time() -> None:
    pools = {"decode": PairPool(actors=8, cpus=1, gpus=0), "find": PairPool(), "embed": PairPool(actors=2)}
    fitted = fit_pools(pools, [{"CPU": 4.0}])
    assert {name: (pool.actors, pool.gpus) for name, pool in fitted.items()} == {
        "decode": (2, 0.0), "find": (1, 0.0), "embed": (2, 0.0)
    }  # fmt: skip
    fitted = fit_pools({**pools, "find": PairPool(actors=9, gpus=0.5)}, [{"CPU": 64.0, "GPU": 2.0}])
    assert {name: (pool.actors, pool.gpus) for name, pool in fitted.items()} == {
        "decode": (8, 0.0), "find": (3, 0.5), "embed": (2, 0.25)
    }  # fmt: skip
    with pytest.raises(DataError, match=r"decode 1 \+ find 0\.5 \+ embed 0\.5 CPUs at the same time.*has 1"):
        fit_pools(pools, [{"CPU": 1.0}])
