"""Every Redis key of a farm, spelled once.

All keys of a farm share the hash tag ``{farm}``, so one script may touch a record, its blob, a flight
and a lease together, also on Redis Cluster. Scripts get :attr:`Keys.prefix` as ``KEYS[1]`` and derive
the rest in the spelling of this table. Names that may hold a colon (leases, flight keys, hosts) come last
in a key, or are told apart by a number, so that no two things share one.

| key after the prefix | type | what |
| --- | --- | --- |
| ``ref:REF`` | string | payload ``ref`` (:class:`cluster.ref.RefRecord`) |
| ``refs`` | zset, score 0 | every ref ID, for lookup by prefix |
| ``refs:used`` | zset | ref ID → last use, milliseconds |
| ``refs:count`` | hash | ref ID → how often used |
| ``chain:CHAIN`` | set | ref IDs with that chain ID |
| ``children:REF`` | set | refs on top of it; one that is no record any more counts for nothing |
| ``users:DIGEST`` | set | refs whose blob it is; likewise |
| ``deleting`` | zset | ``DIGEST KEY`` (``- KEY``) of an object that nothing names → when it may go, milliseconds |
| ``strays`` | zset | ``KEY UPLOAD_ID`` (or ``KEY ``: an object) that nothing names → first seen, milliseconds |
| ``turn:WORK`` | string, seconds | token of who does it: what one process at a time is enough for |
| ``round:WORK`` | string, 400 days | payload ``round`` (:class:`cluster.collect.rounds.Round`) |
| ``blob:DIGEST`` | string | payload ``blob`` (:class:`cluster.ref.BlobRecord`): the blob is present |
| ``absent:DIGEST`` | string, a week | why a blob that was present was found gone or damaged |
| ``providers:DIGEST`` | set | payloads ``provider`` |
| ``images`` | hash | image name → payload ``image`` |
| ``images:digest`` | hash | manifest digest → payload ``image`` |
| ``images:ref`` | hash | top ref ID → payload ``image`` |
| ``leases`` | zset | lease ID → expiry, milliseconds; ``inf``: pinned. A lease is live by this alone |
| ``lease:LEASE`` | hash | ``created`` (milliseconds), ``labels`` |
| ``held:LEASE`` | set | resources it holds |
| ``holders:RESOURCE`` | set | lease IDs that hold it, lapsed ones too until they are swept |
| ``pulse`` | string | when the supervisor last spoke, milliseconds: see ``lua/lib/lapse.lua`` |
| ``epoch`` | string | names this data set's incarnation |
| ``fence`` | counter | last fence number given |
| ``flights`` | set | keys of the flights that are under way; one that died unnoticed stays for a while |
| ``flight:KEY`` | hash, a day | ``epoch fence token owner expires aborting current total`` |
| ``waiters:KEY`` | zset | worker → until when it waits, milliseconds |
| ``upload:KEY`` | hash, a day | ``key upload_id part_bytes``: what the next owner may resume |
| ``parts:KEY`` | hash, a day | part number → ETag |
| ``outcome:KEY:FENCE`` | string, 60 s | payload of the event that ended the flight |
| ``events:KEY`` | channel | payloads of flight events |
| ``proof:LENGTH:IDENTITY:SOURCE`` | zset | digest → expiry, milliseconds |
| ``hosts`` | set | registry hosts that were asked; what is forgotten of them leaves it when they are listed |
| ``host:HOST`` | hash, 1 h | ``limit not_before halved rate lift_at tokens recent asked_at refused``, ``circuit``… |
| ``circuits`` | zset, an hour | registry host that was given up → since when, milliseconds |
| ``quota:KIND:LENGTH:ACCOUNT:HOST`` | hash, a day | ``every last_at hold_at until_at``: what little is left there |
| ``enough:HOST`` | hash, an hour | ``KIND:ACCOUNT`` of whom enough is left → ``LEFT LIMIT UNTIL``, for people |
| ``quotas:HOST`` | zset, a day | ``KIND:ACCOUNT`` of the former → until when it holds, milliseconds |
| ``turns:KIND:LENGTH:ACCOUNT:HOST`` | zset, likewise | who waits for it → when it may ask, milliseconds |
| ``slots:HOST`` | zset, seconds | slot → expiry, milliseconds |
| ``queue:HOST`` | zset, seconds | who waits for a slot → its place |
| ``queue-seen:HOST`` | zset, seconds | who waits for a slot → until when, milliseconds |
| ``progress:STREAM`` | stream, a day | payloads ``progress`` |
| ``local:files`` | hash | digest of a driver's file → payload ``packed``: in which object it lies, and where |
| ``local:trees`` | hash | digest of a driver's directory → key of the object that is its manifest |
| ``local:objects`` | hash | key of an object of these that is there → its length in bytes |
| ``local:used`` | zset | digest of a driver's directory → last use, milliseconds |
| ``local:stands:TREE`` | set | keys of the objects that a driver's directory stands on |
| ``local:users:KEY`` | set | directories that stand on an object |
| ``key:KEY`` | zset, 30 days unused | cache key: record → when it was last published under it, microseconds |
| ``record:RECORD`` | hash, 30 days unused | ``result`` (payload ``result``), ``published`` (microseconds) |
| ``jobs`` | zset | job → when it was submitted, microseconds |
| ``job:JOB`` | hash, a week after its end | ``spec`` (payload ``job``), ``definition``, ``state owner fence``… |
| ``jobs:held`` | zset | job that goes on → until when its owner holds it (since when nobody does), milliseconds |
| ``jobs:attended`` | zset | attached job that goes on → until when its driver is taken to be there, milliseconds |
| ``job-events:JOB`` | stream, a week after its end | ``k`` an event's kind, ``p`` its payload |
| ``job-told:JOB`` | hash, a week after its end | ``log_bytes steps cut:VERTEX``, ``layer:VERTEX ITEM`` |
| ``here:CHAIN`` | zset, a week unused | node that has the snapshot → when that was last noted, milliseconds |
| ``arriving:CHAIN`` | zset, minutes | node that is getting the snapshot → when that was noted, milliseconds |
| ``noted`` | zset | node → since when what is noted of its snapshots counts, milliseconds |
| ``ops:NODE`` | zset | run of an op there → until when that is believed, milliseconds |
| ``traffic`` | hash | a figure of :class:`cluster.traffic.Traffic` → its sum; ``FIGURE REGISTRY`` → its part |
| ``traffic:SECONDS`` | hash, a week | the same, of the five minutes that began then |
| ``audit`` | stream, ``audit.retention_s`` | payloads ``audit`` (:class:`cluster.audit.AuditEntry`) |
| ``mark`` | string | ID of these records: with the farm's name, its mark in the bucket |
| ``nodes`` | string | payload ``nodes``: the nodes as the supervisor last saw them |
| ``draining`` | zset | node that gets no new work → when it was last one of the nodes, milliseconds |
| ``actors`` | hash | actor name → payload ``actor`` |
| ``actor:NAME`` | string, seconds | there while the actor says that it is |
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.digest import Digest
from cluster.job import JobId
from cluster.ref import RefId


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one farm that Python code names itself."""

    farm: str

    @property
    def prefix(self) -> str:
        """Return what every key starts with; scripts get it as ``KEYS[1]``."""
        return f"lf:{{{self.farm}}}"

    def ref(self, ref_id: RefId) -> str:
        """Name a ref's record."""
        return f"{self.prefix}:ref:{ref_id}"

    @property
    def refs(self) -> str:
        """Name the index of every ref by ID."""
        return f"{self.prefix}:refs"

    @property
    def refs_used(self) -> str:
        """Name the index of refs by last use."""
        return f"{self.prefix}:refs:used"

    @property
    def refs_count(self) -> str:
        """Name the usage counts of refs."""
        return f"{self.prefix}:refs:count"

    def chain(self, chain: Digest) -> str:
        """Name the set of refs with a chain ID."""
        return f"{self.prefix}:chain:{chain}"

    def blob(self, digest: Digest) -> str:
        """Name the record of a blob that is present."""
        return f"{self.prefix}:blob:{digest}"

    def providers(self, digest: Digest) -> str:
        """Name the set of providers known for a digest."""
        return f"{self.prefix}:providers:{digest}"

    @property
    def mark(self) -> str:
        """Name the ID of this farm's records."""
        return f"{self.prefix}:mark"

    def round(self, work: str) -> str:
        """Name how far a round of some work has come."""
        return f"{self.prefix}:round:{work}"

    @property
    def deleting(self) -> str:
        """Name the index of objects that are to be deleted."""
        return f"{self.prefix}:deleting"

    @property
    def images(self) -> str:
        """Name the images by name."""
        return f"{self.prefix}:images"

    @property
    def images_by_digest(self) -> str:
        """Name the images by manifest digest."""
        return f"{self.prefix}:images:digest"

    @property
    def images_by_ref(self) -> str:
        """Name the images by top ref."""
        return f"{self.prefix}:images:ref"

    def outcome(self, key: str, fence_number: int) -> str:
        """Name the outcome of a flight."""
        return f"{self.prefix}:outcome:{key}:{fence_number}"

    def events(self, key: str) -> str:
        """Name a flight's channel."""
        return f"{self.prefix}:events:{key}"

    def progress(self, stream: str) -> str:
        """Name a progress stream."""
        return f"{self.prefix}:progress:{stream}"

    @property
    def local_files(self) -> str:
        """Name the index of drivers' files."""
        return f"{self.prefix}:local:files"

    @property
    def local_trees(self) -> str:
        """Name the index of drivers' directories."""
        return f"{self.prefix}:local:trees"

    @property
    def local_objects(self) -> str:
        """Name the objects that drivers' directories lie in."""
        return f"{self.prefix}:local:objects"

    @property
    def local_used(self) -> str:
        """Name the index of drivers' directories by last use."""
        return f"{self.prefix}:local:used"

    def local_stands(self, tree: Digest) -> str:
        """Name the set of objects that a driver's directory stands on."""
        return f"{self.prefix}:local:stands:{tree}"

    @property
    def jobs_held(self) -> str:
        """Name the index of jobs that go on."""
        return f"{self.prefix}:jobs:held"

    def job(self, job: JobId) -> str:
        """Name a job's record."""
        return f"{self.prefix}:job:{job}"

    def job_events(self, job: JobId) -> str:
        """Name the stream of a job's events."""
        return f"{self.prefix}:job-events:{job}"

    def ops(self, node: str) -> str:
        """Name the set of ops that a node runs."""
        return f"{self.prefix}:ops:{node}"

    @property
    def traffic(self) -> str:
        """Name the sums of what was moved and was not."""
        return f"{self.prefix}:traffic"

    def traffic_slot(self, wall_s: int) -> str:
        """Name what was moved and was not in the slot of time that began then."""
        return f"{self.prefix}:traffic:{wall_s}"

    @property
    def audit(self) -> str:
        """Name the audit stream."""
        return f"{self.prefix}:audit"

    @property
    def nodes(self) -> str:
        """Name the list of nodes."""
        return f"{self.prefix}:nodes"

    @property
    def draining(self) -> str:
        """Name the set of nodes that get no new work."""
        return f"{self.prefix}:draining"

    @property
    def actors(self) -> str:
        """Name what actors say of themselves."""
        return f"{self.prefix}:actors"

    def actor_alive(self, name: str) -> str:
        """Name the sign of life of an actor."""
        return f"{self.prefix}:actor:{name}"
