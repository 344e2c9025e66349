"""A retry runs on another host than the job that it retries, if one comes free within two minutes.

POLICY_FILE=/etc/stack/retry_elsewhere.py. A retry on the machine that has just failed often fails again. The step needs
a `key`: by it the earlier jobs are found, as far as the scheduler remembers them (a day).
"""


def decide(job, fleet):
    hosts = {f"host={earlier.host}" for earlier in job.previous if earlier.host}
    return run(avoid=sorted(hosts)[:32], for_seconds=120)
