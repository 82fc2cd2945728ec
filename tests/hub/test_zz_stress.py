import random, threading, time, traceback, pytest
from tests.hub.conftest import *
from tests.hub.test_rows import *
from tests.hub.test_staging import NAMES, RESULT, digest, put, staging
from tests.hub import test_rows


@pytest.mark.parametrize("seed", range(3))
def test_stress(hub, server, client, tmp_path, seed):
    rng = random.Random(seed)
    lock = threading.Lock()

    def delay(_r):
        with lock:
            x = rng.random()
        if x < 0.15:
            time.sleep(0.02 + x * 0.5)

    hub.before = delay
    hub.after = delay
    import sys

    ends = {}
    bad = []

    def run(number, which):
        folder = tmp_path / f"{number}-{which}"
        folder.mkdir()
        time.sleep(random.Random(f"{seed} {number} {which}").random() * 0.3)
        job = staging(our_client(server, 0.05), f"me/target-{number}")
        try:
            staged = job.open()
            if not job.published:
                for name in NAMES:
                    if name not in staged:
                        put(job, name, folder)
                job.publish({name: digest(name) for name in NAMES}, {n: RESULT[n] for n in RESULT if n not in NAMES})
            k = "won"
        except (StagingBusyError, StagingLostError, DestinationMovedError, MissingRevisionError) as e:
            k = type(e).__name__
        except BaseException as e:
            k = "SURPRISE " + repr(e)
            bad.append((number, traceback.format_exc()))
        ends[k] = ends.get(k, 0) + 1

    for number in range(40):
        ts = [threading.Thread(target=run, args=(number, w)) for w in range(2)]
        [t.start() for t in ts]
        [t.join() for t in ts]
        hub.before = hub.after = None
        time.sleep(0.15)
        hub.before = hub.after = delay
        repo = f"me/target-{number}"
        try:
            assert contents(hub, repo) in ({}, RESULT), number
            for commit in hub.store.repo(repo).history("main"):
                assert {path for path in commit.tree if path.endswith(".safetensors")} in (set(), set(NAMES))
            refs = dict(hub.store.repo(repo).refs)
            tree = set(contents(hub, repo))
            job = staging(our_client(server), repo)
            staged = job.open()
            if not job.published:
                for name in set(NAMES) - set(staged):
                    put(job, name, tmp_path)
                job.publish({name: digest(name) for name in NAMES}, {n: RESULT[n] for n in RESULT if n not in NAMES})
            assert contents(hub, repo) == RESULT, number
        except BaseException:
            bad.append(
                (
                    number,
                    "THIRD "
                    + str(refs)
                    + str(tree)
                    + str([c.title for c in hub.store.repo(repo).history("main")])
                    + traceback.format_exc(),
                )
            )
    print(ends)
    for b in bad:
        print(*b)
    assert not bad
