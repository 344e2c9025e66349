"""Which worker a job may go to, and which job goes first."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler import MAX_TAGS, TAG_LETTERS, Job, Profile, RuleIndex, RuleSet

MATCHES: list[tuple[str, str, str, list[str], bool]] = [
    # what it shows, the worker's query, the job's queue, the job's agent query rules, whether they match
    # The queue.
    ("both name the queue", "queue=linux", "linux", ["queue=linux"], True),
    ("another queue", "queue=linux", "mac", ["queue=mac"], False),
    ("the job names no queue", "queue=linux", "linux", [], True),
    ("the job names none and was listed elsewhere", "queue=linux", "default", [], False),
    ("neither names a queue", "arch=amd64", "default", [], True),
    ("the worker names none, the job default", "arch=amd64", "default", ["queue=default"], True),
    ("the worker names none, the job another", "arch=amd64", "linux", ["queue=linux"], False),
    ("the queue it was listed in counts, not the rule", "queue=linux", "linux", ["queue=mac"], True),
    ("the default queue for a worker of default", "queue=default", "_default", [], True),
    ("the default queue for a worker that names none", "arch=amd64", "_default", [], True),
    ("the default queue for a worker of _default", "queue=_default", "_default", [], True),
    ("the default queue for a worker of another", "queue=linux", "_default", [], False),
    ("a queue is not a prefix", "queue=linux", "linux-arm", [], False),
    ("queues differ by case", "queue=Linux", "linux", [], False),
    ("a queue with an equals sign", "queue=a=b", "a=b", ["queue=a=b"], True),
    ("a queue with an equals sign is not its first part", "queue=a=b", "a", ["queue=a"], False),
    ("a queue named twice is one queue", "queue=linux,queue=linux", "linux", [], True),
    ("a key that ends in queue is a tag", "queue=linux,subqueue=a", "linux", ["subqueue=b"], False),
    # Tags.
    ("no rule at all", "queue=default", "default", [], True),
    ("an equal tag", "arch=amd64", "default", ["arch=amd64"], True),
    ("another value", "arch=amd64", "default", ["arch=arm64"], False),
    ("a tag that the worker does not have", "queue=default", "default", ["arch=amd64"], False),
    ("every rule must hold", "arch=amd64,os=linux", "default", ["arch=amd64", "os=linux"], True),
    ("one rule does not hold", "arch=amd64,os=linux", "default", ["arch=amd64", "os=mac"], False),
    ("more tags on the worker", "arch=amd64,os=linux,gpu=a100", "default", ["arch=amd64"], True),
    ("several values for one key, the first", "xcode=15,xcode=16", "default", ["xcode=15"], True),
    ("several values for one key, the second", "xcode=15,xcode=16", "default", ["xcode=16"], True),
    ("several values for one key, both", "xcode=15,xcode=16", "default", ["xcode=15", "xcode=16"], True),
    ("several values for one key, another", "xcode=15,xcode=16", "default", ["xcode=17"], False),
    ("two values that one worker has not both", "xcode=15", "default", ["xcode=15", "xcode=16"], False),
    ("a value with an equals sign", "opt=a=b", "default", ["opt=a=b"], True),
    ("a value with an equals sign is compared whole", "opt=a=b", "default", ["opt=a"], False),
    ("keys differ by case", "Arch=amd64", "default", ["arch=amd64"], False),
    ("values differ by case", "arch=AMD64", "default", ["arch=amd64"], False),
    ("numbers are texts", "mem=8.0", "default", ["mem=8"], False),
    ("a prefix is not the value", "arch=amd64", "default", ["arch=amd"], False),
    # Wildcards.
    ("a bare star", "queue=default", "default", ["*"], True),
    ("a bare star beside a rule", "queue=default", "default", ["*", "arch=amd64"], False),
    ("key=*", "arch=amd64", "default", ["arch=*"], True),
    ("key=* without the key", "os=linux", "default", ["arch=*"], False),
    ("key=", "arch=amd64", "default", ["arch="], True),
    ("key= without the key", "os=linux", "default", ["arch="], False),
    ("a bare key", "arch=amd64", "default", ["arch"], True),
    ("a bare key without the key", "os=linux", "default", ["arch"], False),
    ("a bare key on the worker, for key=*", "docker", "default", ["docker=*"], True),
    ("a bare key on both sides", "docker", "default", ["docker"], True),
    ("a bare key on the worker has no value", "docker", "default", ["docker=true"], False),
    ("a value is not a key", "arch=amd64", "default", ["amd64"], False),
    ("the same key by value and by star", "arch=amd64", "default", ["arch=*", "arch=amd64"], True),
    ("a star inside a value is only a letter", "arch=amd64", "default", ["arch=amd*"], False),
    ("a star inside a value equals itself", "arch=amd*", "default", ["arch=amd*"], True),
    ("a star inside a key is only a letter", "arch=amd64", "default", ["a*=amd64"], False),
    ("queue=* is the listed queue", "queue=linux", "linux", ["queue=*"], True),
    ("a star on the worker fits no value", "arch=*", "default", ["arch=amd64"], False),
    # Blanks.
    ("blanks around the worker's tags", " queue = linux , arch = amd64 ", "linux", ["arch=amd64"], True),
    ("blanks around the job's rule", "arch=amd64", "default", [" arch = amd64 "], True),
    ("blanks around a star", "arch=amd64", "default", [" arch = * ", " * "], True),
    ("a blank inside a value counts", "host=big mac", "default", ["host=big mac"], True),
    ("a blank inside a value is not left out", "host=bigmac", "default", ["host=big mac"], False),
    ("empty tags of the worker", ",arch=amd64,,", "default", ["arch=amd64"], True),
    # Rules that are not understood match nobody.
    ("an empty rule", "queue=default", "default", [""], False),
    ("a blank rule beside one that holds", "arch=amd64", "default", ["arch=amd64", " "], False),
    ("a rule without a key", "foo,=foo", "default", ["=foo"], False),
    ("a rule without key and value", "queue=default", "default", ["="], False),
    ("a star for the key", "arch=gpu", "default", ["*=gpu"], False),
    ("a star for both", "arch=gpu", "default", ["*=*"], False),
    ("a star for the key without a value", "arch=gpu", "default", ["*="], False),
    # A query parts its tags by commas, a rule is one text.
    ("a comma inside a rule is not two rules", "a=1,b=2", "default", ["a=1,b=2"], False),
]


@pytest.mark.parametrize(
    ("query", "queue_key", "rules", "expected"), [case[1:] for case in MATCHES], ids=[case[0] for case in MATCHES]
)
def test_match_of_worker_and_job_is_as_the_table_says(
    query: str, queue_key: str, rules: list[str], expected: bool
) -> None:
    assert Profile.of(query).matches(RuleSet.of(queue_key, rules)) is expected


@pytest.mark.parametrize("query", ["queue=a,queue=b", "queue=default,queue=_default", "queue=a,arch=amd64, queue = b"])
def test_match_with_two_queues_in_the_query_raises_value_error(query: str) -> None:
    with pytest.raises(ValueError, match="2 queues"):
        Profile.of(query)


@pytest.mark.parametrize("query", ["", " ", ",", " , "])
def test_match_with_empty_query_raises_value_error(query: str) -> None:
    with pytest.raises(ValueError, match="empty"):
        Profile.of(query)


def test_match_of_equal_tags_in_any_order_is_one_profile() -> None:
    assert Profile.of("queue=linux,a=1,b") == Profile.of("b , a=1,queue=linux,a=1")


# --- The text of a rule set, by which jobs are indexed ---


@pytest.mark.parametrize(
    ("queue_key", "rules", "expected"),
    [
        ("default", [], "queue=default"),
        ("default", ["queue=default", "*"], "queue=default"),
        ("linux", ["os=linux", "arch=amd64"], "queue=linux,arch=amd64,os=linux"),
        ("linux", ["gpu", "arch="], "queue=linux,arch=*,gpu=*"),
        ("linux", [" gpu = a100 ", "gpu=a100"], "queue=linux,gpu=a100"),
        ("linux", ["a=1,b=2"], "queue=linux,a=1\\,b=2"),
        ("linux", ["a=1\\", "b=2"], "queue=linux,a=1\\\\,b=2"),
        ("linux", [" ", " * = gpu ", "=a,b", "z=1"], "queue=linux,*=gpu,=,=a\\,b,z=1"),
    ],
)
def test_text_of_rule_set_is_queue_then_sorted_rules(queue_key: str, rules: list[str], expected: str) -> None:
    assert str(RuleSet.of(queue_key, rules)) == expected


#: Few letters, so that what could be confused is drawn often.
RULES = st.lists(st.text("ab=,*\\ ", max_size=8), max_size=4)
QUEUES = st.sampled_from(["default", "_default", "a", "b"])
TAGS = st.lists(st.sampled_from(["a", "b", "a=a", "a=b", "b=a", "b=*", "ab=a", "*", "a=a=b"]), max_size=5)


@given(rules=RULES, seed=st.integers())
def test_text_of_rule_set_in_any_order_and_repeated_stays_the_same(rules: list[str], seed: int) -> None:
    shuffled = random.Random(seed).sample([*rules, *rules[:2]], len(rules) + len(rules[:2]))
    assert str(RuleSet.of("a", shuffled)) == str(RuleSet.of("a", rules))


@given(first=st.tuples(QUEUES, RULES), second=st.tuples(QUEUES, RULES))
def test_text_of_different_rule_sets_is_never_the_same(
    first: tuple[str, list[str]], second: tuple[str, list[str]]
) -> None:
    one, other = RuleSet.of(*first), RuleSet.of(*second)
    assert (str(one) == str(other)) is (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["a=1,b=2"], ["a=1", "b=2"]),
        (["a=1\\,b=2"], ["a=1", "b=2"]),
        (["a=1\\,b=2"], ["a=1,b=2"]),
        (["a=1\\,b=2"], ["a=1\\", "b=2"]),
        (["a=1,b=*"], ["a=1", "b=*"]),
        (["a=1,b"], ["a=1", "b"]),
    ],
)
def test_text_of_rules_with_commas_is_not_that_of_several_rules(one: list[str], other: list[str]) -> None:
    assert str(RuleSet.of("a", one)) != str(RuleSet.of("a", other))


# --- What holds for every worker and job ---


@given(queue_key=QUEUES, worker_queue=QUEUES, tags=TAGS, more=TAGS, rules=RULES)
def test_match_with_more_tags_on_the_worker_is_never_lost(
    queue_key: str, worker_queue: str, tags: list[str], more: list[str], rules: list[str]
) -> None:
    job = RuleSet.of(queue_key, rules)
    before = Profile.of(",".join([f"queue={worker_queue}", *tags]))
    after = Profile.of(",".join([f"queue={worker_queue}", *more, *tags]))
    assert after.matches(job) or not before.matches(job)


@given(queue_key=QUEUES, worker_queue=QUEUES, tags=TAGS, rules=RULES)
def test_match_of_several_rules_is_that_of_each_alone(
    queue_key: str, worker_queue: str, tags: list[str], rules: list[str]
) -> None:
    worker = Profile.of(",".join([f"queue={worker_queue}", *tags]))
    alone = [worker.matches(RuleSet.of(queue_key, [rule])) for rule in rules]
    bare = worker.matches(RuleSet.of(queue_key, []))
    assert worker.matches(RuleSet.of(queue_key, rules)) is all([bare, *alone])


@given(queue_key=QUEUES, tags=TAGS)
def test_match_of_worker_with_the_job_s_own_rules_as_tags_is_given(queue_key: str, tags: list[str]) -> None:
    assert Profile.of(",".join([f"queue={queue_key}", *tags])).matches(RuleSet.of(queue_key, tags))


@given(queries=st.lists(TAGS), rule_sets=st.lists(st.tuples(QUEUES, RULES)), gone=st.integers(0, 3))
def test_match_by_index_is_that_of_each_rule_set_alone(
    queries: list[list[str]], rule_sets: list[tuple[str, list[str]]], gone: int
) -> None:
    texts = {str(RuleSet.of(*each)) for each in rule_sets}
    index, left = RuleIndex(texts), sorted(texts)[gone:]
    index.keep([*left, "queue=default,late=1"])
    index.remove("queue=default,late=1")
    index.remove("queue=default,never=1")
    assert len(index) == len(left)
    for tags in queries:
        profile = Profile.of(",".join(["queue=default", *tags]))
        matching = sorted(text for text in left if profile.matches(RuleSet.read(text)))
        assert sorted(text for text, _ in index.matching(profile)) == matching
        assert index.matches(profile) is bool(matching)


# --- Which job goes first ---


def listed(number: int, priority: Any, scheduled_at: str | None) -> Job:
    raw = {"id": f"018f0000-0000-4000-8000-{number:012}", "priority": priority, "scheduled_at": scheduled_at}
    return Job.from_api("default", raw, 1_800_000_000.0)


EARLY, LATE = "2026-11-21T07:00:00Z", "2026-11-21T07:00:01Z"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (listed(2, 1, LATE), listed(1, 0, EARLY)),
        (listed(2, 0, LATE), listed(1, -1, EARLY)),
        (listed(2, -1, LATE), listed(1, -10, EARLY)),
        (listed(2, 10, LATE), listed(1, 9, EARLY)),
        (listed(2, None, EARLY), listed(1, 0, LATE)),
        (listed(2, 5, EARLY), listed(1, 5, LATE)),
        (listed(2, 5, "2026-11-21T08:00:00+01:00"), listed(1, 5, LATE)),
        (listed(2, 5, LATE), listed(1, 5, None)),
        (listed(1, 5, EARLY), listed(2, 5, EARLY)),
    ],
    ids=[
        "the higher priority before the older",
        "none before a negative priority",
        "the less negative priority",
        "priorities are numbers, not texts",
        "no priority is 0",
        "the older of one priority",
        "ages in different time zones",
        "no time is now",
        "the smaller uuid of one priority and age",
    ],
)
def test_order_of_two_jobs_is_priority_then_age_then_uuid(first: Job, second: Job) -> None:
    assert first.order < second.order


@pytest.mark.parametrize("query", ["queue=", "queue=*", "queue", "queue=,arch=amd64"])
def test_read_query_with_a_queue_without_a_name_is_refused(query: str) -> None:
    with pytest.raises(ValueError, match="queue without a name"):
        Profile.of(query)


def test_read_query_with_as_many_and_as_long_tags_as_may_be_is_read() -> None:
    tags = [f"{number:=<{TAG_LETTERS}}" for number in range(MAX_TAGS)]
    assert len(Profile.of(",".join(tags)).tags) == MAX_TAGS


@pytest.mark.parametrize("query", [",".join(f"t{number}" for number in range(MAX_TAGS)), "x" * TAG_LETTERS])
def test_read_the_text_of_a_profile_at_its_bounds_gives_the_profile(query: str) -> None:
    """Schedulers tell each other of workers so."""
    profile = Profile.of(query)
    assert Profile.of(str(profile)) == profile


def test_read_query_with_one_tag_too_many_is_refused_with_how_many() -> None:
    with pytest.raises(ValueError, match=f"has {MAX_TAGS + 1} tags; a worker may have {MAX_TAGS}"):
        Profile.of(",".join(f"t{number}" for number in range(MAX_TAGS + 1)))


def test_read_query_with_a_tag_too_long_is_refused_with_which_one() -> None:
    for key in ("os", "queue"):
        query = f"arch=amd64,{key}=" + "x" * (TAG_LETTERS - len(key))
        with pytest.raises(
            ValueError, match=f"tag '{key}=xx.*has {TAG_LETTERS + 1} letters; it may have {TAG_LETTERS}"
        ):
            Profile.of(query)
