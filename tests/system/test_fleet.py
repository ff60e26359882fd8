"""Flower's fleet protocol as we use it, without a model: what `fleet_server` and `fleet_node` rely on, and what they add.

A change of Flower's that breaks one of these would break every deployment.

Run: pytest tests/system/test_fleet.py
"""

import collections
import contextlib
import datetime
import re
import shutil
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import flwr
import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError

from cooperllm.config import FederationConfig, RunConfig
from cooperllm.deployment.enrolment import Places, enroll, read_public_keys
from cooperllm.deployment.settings import Job
from cooperllm.errors import ConfigError, LinkError
from cooperllm.link import fleet_node, fleet_server
from cooperllm.link.fleet_link import FleetLink, fleet_links
from cooperllm.link.fleet_node import Server, connected, read_private_key, serve
from cooperllm.link.fleet_server import Address, FleetServer
from cooperllm.link.flower import LATE
from cooperllm.link.request_limit import LARGEST_REQUEST_BYTES, RequestLimit
from cooperllm.link.tls import Certificate

HERE = Address(host="127.0.0.1", port=0)


@pytest.fixture
def keys(tmp_path):
    """Two nodes' key files and public keys."""
    found = {}
    for number in (3, 5):
        key = ec.generate_private_key(ec.SECP384R1())
        kinds = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (tmp_path / f"{number}.key").write_bytes(key.private_bytes(*kinds))
        public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        found[number] = tmp_path / f"{number}.key", public
    return found


@contextlib.contextmanager
def serving(keys, numbers=(3, 5)):
    with FleetServer({number: keys[number][1] for number in numbers}, HERE, None) as server:
        yield server


@contextlib.contextmanager
def node(server, file, answer, **hands):
    """A node in a thread of this process, until the end."""
    stop = threading.Event()
    there = Server(address=str(server.address), key=file, authority=None)
    thread = threading.Thread(target=serve, args=(there, answer, stop), kwargs=hands)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def present(server, file):
    """A process that has said it is there and does what the test says."""
    return connected(Server(address=str(server.address), key=file, authority=None), read_private_key(file))


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 12 << 20])
def test_bytes_come_back_as_they_were_sent_in_one_part_or_in_chunks(keys, size):
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    with serving(keys) as server, node(server, keys[3][0], lambda found: found[::-1]):
        assert FleetLink(server, "node", 60).send([(3, data)]) == {3: data[::-1]}


def test_what_a_node_raises_is_a_reason_and_the_next_message_is_answered(keys):
    def answer(data):
        if data == b"bad":
            raise ValueError("not this one")
        return data

    with serving(keys) as server, node(server, keys[3][0], answer):
        link = FleetLink(server, "node", 60)
        assert link.send([(3, b"bad")]) == {}
        assert "ValueError: not this one" in link.lost_reasons[3]
        assert link.send([(3, b"good")]) == {3: b"good"}
        assert link.lost_reasons == {}


def test_who_is_not_there_is_not_waited_for_after_the_beginning(keys):
    with serving(keys) as server, node(server, keys[3][0], lambda data: data):
        link = FleetLink(server, "node", 60, patience_s=0.5)
        assert link.send([(3, b"a"), (5, b"b")]) == {3: b"a"}
        assert link.lost_reasons == {5: "not connected"}
        begun = time.monotonic()
        assert link.send([(5, b"b")]) == {}
        assert time.monotonic() - begun < 0.5


def test_who_is_slow_is_not_waited_for_where_more_were_asked_than_are_needed(keys):
    """Its answer comes to nothing, and it takes part in the next round as if nothing had been."""
    release = threading.Event()

    def slow(data):
        assert data != b"first" or release.wait(20)
        return data

    with serving(keys) as server, node(server, keys[3][0], lambda data: data), node(server, keys[5][0], slow):
        links = fleet_links(server, "node", 60, over_selection=2.0)
        first = links()
        assert first.send([(3, b"first"), (5, b"first")]) == {3: b"first"}
        assert first.lost_reasons == {5: LATE}
        release.set()
        begun = time.monotonic()
        assert FleetLink(server, "node", 60).send([(3, b"second"), (5, b"second")]) == {3: b"second", 5: b"second"}
        assert time.monotonic() - begun < 10
        assert not server._state.message_res_store, "the late answer is kept by nobody"
        assert len(server._state.object_store) == 0, "nor is the order"


def test_a_second_exchange_of_a_round_waits_for_its_own_answers(keys):
    """Whoever turned out to be behind is asked again over the same link; what others had answered before is not enough."""
    with serving(keys) as server, node(server, keys[3][0], lambda data: data), node(server, keys[5][0], lambda data: data):
        link = FleetLink(server, "node", 60)
        assert link.send([(3, b"first"), (5, b"first")]) == {3: b"first", 5: b"first"}
        assert link.send([(5, b"again")]) == {5: b"again"}
        assert set(link.spent) == {5}


def test_a_node_with_a_free_hand_is_given_a_message_once(keys):
    """Its second question is open while the first message is answered."""
    answered = []

    def answer(data):
        answered.append(data)
        time.sleep(0.5)
        return data

    with serving(keys) as server, node(server, keys[3][0], answer, at_once=2):
        assert FleetLink(server, "node", 60).send([(3, b"once")]) == {3: b"once"}
    assert answered == [b"once"]


@pytest.mark.parametrize(("most_at_work", "expected"), [(2, b"together"), (1, b"alone")])
def test_messages_in_hand_side_by_side_are_answered_side_by_side_or_one_by_one(keys, most_at_work, expected):
    """Both are fetched at once; the second is answered while the first one is, or has to wait for it and says how long."""
    both = threading.Barrier(2, timeout=0.5)

    def answer(data):
        try:
            both.wait()
        except threading.BrokenBarrierError:
            return b"alone"
        return b"together"

    with serving(keys) as server, node(server, keys[3][0], answer, at_once=2, most_at_work=most_at_work):
        links = [FleetLink(server, "node", 60) for _ in range(2)]
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda link: link.send([(3, b"")]), links))
    assert found == [{3: expected}] * 2
    assert (max(link.spent[3].waited_s for link in links) > 0.3) == (most_at_work == 1)


def test_a_message_whose_node_was_killed_is_given_again_when_it_comes_back(keys):
    """The first process takes it and never answers; a second one with the same key gets the same bytes."""
    answers = {}
    with serving(keys) as server, present(server, keys[3][0]) as killed:
        link = FleetLink(server, "node", 60)
        waiting = threading.Thread(target=lambda: answers.update(link.send([(3, b"again")])))
        waiting.start()
        while killed.receive() is None:
            pass
        with node(server, keys[3][0], lambda data: data + b"!"):
            waiting.join(30)
    assert answers == {3: b"again!"}


def test_a_question_that_a_killed_process_left_open_takes_no_message(keys):
    """It is open for two seconds more; what arrives meanwhile is for the process that asked last."""
    taken = []
    with serving(keys) as server, present(server, keys[3][0]) as killed:
        for _ in range(3):
            left_open = threading.Thread(target=lambda: taken.append(killed.receive()))
            left_open.start()
            time.sleep(0.2)
            with node(server, keys[3][0], lambda data: data + b"!"):
                time.sleep(0.3)
                assert FleetLink(server, "node", 10).send([(3, b"mine")]) == {3: b"mine!"}
            left_open.join()
    assert taken == [None, None, None]


def test_a_node_has_the_same_number_after_its_server_was_away(keys):
    numbers = []
    for _ in range(2):
        with serving(keys) as server:
            numbers.append(server.nodes)
    assert numbers[0] == numbers[1]
    assert len(set(numbers[0].values())) == 2


def test_a_key_that_is_not_enrolled_is_refused_in_a_sentence(keys):
    with serving(keys, numbers=(3,)) as server, pytest.raises(LinkError, match="does not let this node in: expected its key"):
        serve(Server(address=str(server.address), key=keys[5][0], authority=None), lambda data: data, threading.Event())


def test_a_server_without_a_certificate_of_the_authority_is_told_nothing(tmp_path):
    """One with another authority's, and one in plain text: both end with a sentence before a key has signed anything."""
    federation = FederationConfig(num_devices=1, num_edges=1, devices_per_round=1)
    for name in ("ours", "theirs"):
        job = Job(config=RunConfig(federation=federation), num_parameters=7)
        enroll(tmp_path / name, job, Places(cloud="127.0.0.1:9100", edges=("127.0.0.1:9101",)))
    edge, device = tmp_path / "theirs" / "edge-0", tmp_path / "ours" / "device-0"
    for certificate in (Certificate(chain=edge / "server.pem", key=edge / "server.key"), None):
        with FleetServer(read_public_keys(edge / "devices"), HERE, certificate) as server:
            there = Server(address=str(server.address), key=device / "node.key", authority=device / "authority.pem")
            with pytest.raises(LinkError, match=r"is not who it should be .* expected a certificate signed by .*authority.pem"):
                serve(there, lambda data: data, threading.Event())


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory):
    """Two deployments, each with an authority of its own, with an edge and two devices."""
    path = tmp_path_factory.mktemp("enrolled")
    job = Job(config=RunConfig(federation=FederationConfig(num_devices=2, num_edges=1, devices_per_round=1)), num_parameters=7)
    for name in ("ours", "theirs"):
        enroll(path / name, job, Places(cloud="127.0.0.1:9100", edges=("127.0.0.1:9101",)))
    return path


def demanding(deployment):
    """An edge's server that wants a certificate of every node."""
    edge = deployment / "edge-0"
    certificate = Certificate(chain=edge / "server.pem", key=edge / "server.key", node_authority=edge / "authority.pem")
    return FleetServer(read_public_keys(edge / "devices"), HERE, certificate)


def asked_over_tls(server, authority, shown):
    """A request of somebody who shows a certificate, or none."""
    context = ssl.create_default_context(cafile=authority)
    if shown is not None:
        context.load_cert_chain(shown.with_suffix(".pem"), shown.with_suffix(".key"))
    return httpx.post(f"https://{server.address}/v1/fleet/pull-messages", headers={"content-type": "application/protobuf"}, verify=context)


def test_without_a_certificate_of_the_authority_no_handshake_ends_and_no_request_is_read(enrolled, monkeypatch):
    """Nor with the certificate of a server, which this authority has signed as well."""
    read, serve_request = [], RequestLimit.__call__

    async def noted(limit, scope, receive, send):
        read.extend([scope["path"]] if scope["type"] == "http" else [])
        await serve_request(limit, scope, receive, send)

    monkeypatch.setattr(RequestLimit, "__call__", noted)
    authority = enrolled / "ours" / "authority" / "authority.pem"
    with demanding(enrolled / "ours") as server:
        for shown in (None, enrolled / "theirs" / "device-0" / "node", enrolled / "ours" / "edge-0" / "server"):
            with pytest.raises(httpx.TransportError):
                asked_over_tls(server, authority, shown)
        assert read == []
        answer = asked_over_tls(server, authority, enrolled / "ours" / "device-0" / "node")
        assert answer.status_code == 401, "whoever is through the handshake has to sign requests all the same"
        assert read == ["/v1/fleet/pull-messages"]


def there(server, device, **changes):
    found = {"key": device / "node.key", "authority": device / "authority.pem", "certificate": device / "node.pem"}
    return Server(address=str(server.address), **(found | changes))


def test_a_node_shows_its_certificate_and_one_without_is_never_there(enrolled, caplog):
    devices, stop = [enrolled / "ours" / f"device-{number}" for number in (0, 1)], threading.Event()
    with demanding(enrolled / "ours") as server:
        given = [there(server, devices[0]), there(server, devices[1], certificate=None)]
        threads = [threading.Thread(target=serve, args=(one, lambda data: data[::-1], stop)) for one in given]
        for thread in threads:
            thread.start()
        try:
            link = FleetLink(server, "node", 60, patience_s=3)
            assert link.send([(0, b"shown"), (1, b"not shown")]) == {0: b"nwohs"}
            assert link.lost_reasons == {1: "not connected"}
        finally:
            stop.set()
            for thread in threads:
                thread.join(20)
    assert "or it wants another certificate than none" in caplog.text


def test_a_certificate_lets_nobody_in_whose_key_is_not_enrolled(enrolled, tmp_path):
    """To lock a device out it is enough to delete the file of its key; its certificate stays good."""
    shutil.copytree(enrolled / "ours", tmp_path / "ours")
    (tmp_path / "ours" / "edge-0" / "devices" / "1.pem").unlink()
    with demanding(tmp_path / "ours") as server, pytest.raises(LinkError, match="does not let this node in: expected its key"):
        serve(there(server, tmp_path / "ours" / "device-1"), lambda data: data, threading.Event())


def test_a_certificate_for_another_key_is_refused_in_a_sentence_before_anybody_is_asked(enrolled):
    ours = enrolled / "ours"
    for wrong in (ours / "device-1" / "node.pem", ours / "device-0" / "device.toml", ours / "nowhere.pem"):
        server = Server(
            address="127.0.0.1:9", key=ours / "device-0" / "node.key", authority=ours / "authority/authority.pem", certificate=wrong
        )
        with pytest.raises(ConfigError, match=r"node\.key .*; `cooperllm enroll` writes them"):
            serve(server, lambda data: data, threading.Event())


def test_a_server_that_goes_in_the_middle_of_a_handshake_is_away_and_not_an_impostor(tmp_path, caplog):
    """So does a proxy whose server is not there yet: the node looks again, where one that finds an impostor ends."""
    job = Job(config=RunConfig(federation=FederationConfig(num_devices=1, num_edges=1, devices_per_round=1)), num_parameters=7)
    enroll(tmp_path / "all", job, Places(cloud="127.0.0.1:9100", edges=("127.0.0.1:9101",)))
    edge, device = tmp_path / "all" / "edge-0", tmp_path / "all" / "device-0"
    with socket.create_server(("127.0.0.1", 0)) as closing:
        port = closing.getsockname()[1]
        there = Server(address=f"127.0.0.1:{port}", key=device / "node.key", authority=device / "authority.pem")
        stop = threading.Event()
        thread = threading.Thread(target=serve, args=(there, lambda data: data, stop))
        thread.start()
        closing.accept()[0].close()
    try:
        certificate = Certificate(chain=edge / "server.pem", key=edge / "server.key")
        with FleetServer(read_public_keys(edge / "devices"), Address(host="127.0.0.1", port=port), certificate) as server:
            assert FleetLink(server, "node", 60).send([(0, b"back")]) == {0: b"back"}
            stop.set()
            thread.join(20)
    finally:
        stop.set()
        thread.join(20)
    assert "is away" in caplog.text


def test_a_refused_node_leaves_the_process_alone(keys):
    """Flower's own connection ends the whole process five seconds after it was refused, with whatever else it was doing."""
    before = set(threading.enumerate())
    with serving(keys, numbers=(3,)) as server, pytest.raises(LinkError):
        serve(Server(address=str(server.address), key=keys[5][0], authority=None), lambda data: data, threading.Event())
    left = [thread.name for thread in set(threading.enumerate()) - before if "exit" in thread.name]
    assert left == []


@contextlib.contextmanager
def requests_seen(monkeypatch):
    """Every request of nodes in this process, as it leaves."""
    sent, send = [], httpx.Client.send

    def noted(client, request, **given):
        sent.append(request)
        return send(client, request, **given)

    with monkeypatch.context() as patched:
        patched.setattr(httpx.Client, "send", noted)
        yield sent


def paths_of(requests):
    return [request.url.path.rpartition("/")[2] for request in requests]


def test_a_short_message_is_one_request_each_way(keys, monkeypatch):
    """Flower's way is nine: a question for work, three parts, a word of an answer, its three parts, and that the order has arrived."""
    with serving(keys) as server, requests_seen(monkeypatch) as sent, node(server, keys[3][0], lambda data: data):
        assert FleetLink(server, "node", 60).send([(3, b"short")]) == {3: b"short"}
        assert len(server._state.object_store) == 0, "nothing of it is kept"
    assert collections.Counter(paths_of(sent))["push-messages"] == 1
    assert set(paths_of(sent)) == {"activate-node", "send-node-heartbeat", "pull-messages", "push-messages", "deactivate-node"}


def test_the_parts_of_a_long_message_travel_side_by_side_but_only_a_few(keys, monkeypatch):
    """48 MiB are ten chunks and four parts around them; each way is slowed down so that those under way at once can be counted."""
    under_way, most, alone = collections.Counter(), collections.Counter(), threading.Lock()

    def slowed(kind, work):
        def slow(*given):
            with alone:
                under_way[kind] += 1
                most[kind] = max(most[kind], under_way[kind])
            time.sleep(0.1)
            with alone:
                under_way[kind] -= 1
            return work(*given)

        return slow

    for kind in ("PullObject", "PushObject"):
        monkeypatch.setattr(fleet_node.FleetHttpClient, kind, slowed(kind, getattr(fleet_node.FleetHttpClient, kind)))
    data = b"".join(bytes([number]) * (4 << 20) for number in range(12))
    with serving(keys) as server, node(server, keys[3][0], lambda found: found):
        assert FleetLink(server, "node", 60).send([(3, data)]) == {3: data}
    assert most == {"PullObject": fleet_node.PARTS_AT_ONCE, "PushObject": fleet_node.PARTS_AT_ONCE}


def test_a_part_that_fails_ends_the_others_and_the_message_comes_again(keys, monkeypatch):
    """One part's connection is reset for good: no half of a message is inflated, and the node takes the order a second time."""
    failures, pull = [], fleet_node.FleetHttpClient.PullObject

    def broken(client, request):
        if not failures:
            failures.append(request.object_id)
            raise ObjectPullError(request.object_id, "the test says so")
        return pull(client, request)

    monkeypatch.setattr(fleet_node.FleetHttpClient, "PullObject", broken)
    data = bytes(range(256)) * (8 << 12)
    with serving(keys) as server, node(server, keys[3][0], lambda found: found[::-1]):
        assert FleetLink(server, "node", 60).send([(3, data)]) == {3: data[::-1]}
    assert len(failures) == 1


def shown_again(server, request, content=None):
    """The answer to a request with the headers of one that was recorded, from another connection."""
    kept = {name: request.headers[name] for name in request.headers if name not in {"host", "content-length", "connection"}}
    return httpx.post(f"http://{server.address}{request.url.path}", headers=kept, content=request.content if content is None else content)


def test_a_recorded_request_is_refused_and_the_node_goes_on(keys, monkeypatch):
    """Goodbyes, questions for work and answers: the first would lose the node, the second an order, the third count twice."""
    with serving(keys) as server, requests_seen(monkeypatch) as sent, node(server, keys[3][0], lambda data: data):
        link = FleetLink(server, "node", 60)
        assert link.send([(3, b"first")]) == {3: b"first"}
        recorded = {path: request for path, request in zip(paths_of(sent), sent, strict=True) if path != "deactivate-node"}
        for path in ("activate-node", "pull-messages", "push-messages"):
            assert shown_again(server, recorded[path]).status_code == 409, path
        goodbye = DeactivateNodeRequest(node_id=server.nodes[3]).SerializeToString()
        stolen = httpx.Request("POST", f"http://{server.address}/v1/fleet/deactivate-node", headers=recorded["push-messages"].headers)
        assert shown_again(server, stolen, goodbye).status_code == 409, "a signature of one request does for no other"
        assert server.online() == {3}
        assert link.send([(3, b"second")]) == {3: b"second"}


def test_a_request_recorded_before_a_server_was_started_again_is_refused(keys, monkeypatch):
    with serving(keys) as server, requests_seen(monkeypatch) as sent, node(server, keys[3][0], lambda data: data):
        assert FleetLink(server, "node", 60).send([(3, b"")]) == {3: b""}
    later = fleet_server._now() + datetime.timedelta(seconds=10)
    monkeypatch.setattr(fleet_server, "_now", lambda: later)
    with serving(keys) as server:
        assert shown_again(server, sent[0]).status_code == 409


def test_a_signature_with_another_key_leaves_no_trace(keys, monkeypatch):
    """Whoever has only seen a public key cannot make the server refuse its owner."""
    with serving(keys) as server, requests_seen(monkeypatch) as sent, node(server, keys[3][0], lambda data: data):
        link = FleetLink(server, "node", 60)
        assert link.send([(3, b"first")]) == {3: b"first"}
        forged = httpx.Request("POST", sent[0].url, headers=sent[0].headers, content=sent[0].content)
        in_a_while = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=4)
        forged.headers[fleet_node.TIMESTAMP_HEADER] = in_a_while.isoformat()
        assert [shown_again(server, forged).status_code for _ in range(2)] == [401, 401]
        time.sleep(4)
        assert link.send([(3, b"second")]) == {3: b"second"}


def test_a_body_that_grows_beyond_the_bound_is_refused_before_it_has_arrived(keys):
    """It announces no length: what was sent of a gigabyte when the answer came is what had been under way."""
    sent = []

    def growing():
        for _ in range(1 << 10):
            sent.append(1 << 20)
            yield bytes(1 << 20)

    with serving(keys) as server:
        answer = httpx.post(
            f"http://{server.address}/v1/fleet/push-object", headers={"content-type": "application/protobuf"}, content=growing()
        )
        assert answer.status_code == 413
    assert sum(sent) < 10 * LARGEST_REQUEST_BYTES


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_node_whose_clock_is_an_hour_off_takes_its_servers(keys, monkeypatch, caplog, hours):
    right = fleet_node._now
    monkeypatch.setattr(fleet_node, "_now", lambda: right() + datetime.timedelta(hours=hours))
    with serving(keys) as server, node(server, keys[3][0], lambda data: data + b"!"):
        assert FleetLink(server, "node", 60).send([(3, b"when")]) == {3: b"when!"}
    assert re.search(rf"clock is {'-' if hours < 0 else ''}(3599|3600|3601) s off", caplog.text)


def test_a_port_that_is_taken_is_said_so(keys):
    with serving(keys) as server, pytest.raises(LinkError, match=r"cannot listen there .*choose another port"):
        FleetServer({3: keys[3][1]}, server.address, None)


def test_another_flower_is_refused_before_anything_runs(keys, monkeypatch):
    monkeypatch.setattr(flwr, "__version__", "9.9.9")
    with pytest.raises(LinkError, match=r"flwr 9.9.9 found, 1.41.0 expected: pip install"):
        FleetServer({3: keys[3][1]}, HERE, None)
