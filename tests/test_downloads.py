"""A server on loopback, which the default rule refuses and ``local`` takes."""

import hashlib
import io
import socket
import ssl
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address

import pandas as pd
import pytest
import yaml
from PIL import Image
from test_scenarios import LEAST

from basinlab import __main__
from basinlab.published import downloads, scenarios


def local(address):
    return address == ip_address("127.0.0.1")


def picture(side=80, format="PNG"):
    content = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).save(content, format)
    return content.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers by path; counts what it was asked in ``server.asked``."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append(self.path)
        self.server.hosts.append(self.headers["Host"])
        name = self.path.split("?")[0].strip("/")
        if name == "redirect":
            return self.answer(302, b"", Location=self.path.split("?to=")[1])
        if name == "loop":
            return self.answer(302, b"", Location="/loop")
        if name == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(picture())
            self.close_connection = True
            return None
        if name == "chunked.png":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for part in (picture()[:50], picture()[50:], b""):
                self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            return None
        if name == "slow":
            self.server.released.wait(20)
            return self.answer(200, picture())
        contents = {
            "a.png": picture(),
            "b.jpg": picture(100, "JPEG"),
            "sp%20ace@2x.png": picture(90),
            "small.png": picture(20),
            "huge.png": picture(400),
            "page": b"<html>no more</html>",
            "half.png": picture()[:-60],
            "icon.bmp": picture(80, "BMP"),
            "empty": b"",
        }
        if name in ("500", "404", "410", "403"):
            return self.answer(int(name), b"")
        return self.answer(200, contents[name]) if name in contents else self.answer(404, b"")

    def answer(self, status, content, **headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextmanager
def serving(host="127.0.0.1", context=None):
    server = ThreadingHTTPServer((host, 0), Handler)
    server.asked, server.hosts, server.released = [], [], threading.Event()
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f"{'https' if context else 'http'}://127.0.0.1:{server.server_port}"
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def server():
    with serving() as server:
        yield server


def fetched(urls, folder, **options):
    """The rows of the record, by the end of their url."""
    options = {"allowed": local, "progress": False, "timeout": 5} | options
    table = downloads.fetch(urls, folder, **options)
    assert table["url"].tolist() == list(dict.fromkeys(urls))
    return {row["url"].rsplit("/", 1)[-1]: row for row in table.to_dict("records")}


def statuses(rows):
    return {name: row["status"] for name, row in rows.items()}


def test_pictures_are_kept_as_they_came(server, tmp_path):
    names = ["a.png", "b.jpg", "chunked.png", "sp ace@2x.png"]
    rows = fetched([f"{server.url}/{name}" for name in names], tmp_path)
    assert statuses(rows) == dict.fromkeys(names, "got")
    assert (tmp_path / rows["chunked.png"]["file"]).read_bytes() == picture()
    assert rows["b.jpg"]["file"].endswith(".jpg")
    assert rows["b.jpg"]["sha256"] == hashlib.sha256(picture(100, "JPEG")).hexdigest()
    assert not list(tmp_path.glob("*.part"))


def test_what_is_no_picture_of_sane_size_is_gone_and_says_why(server, tmp_path):
    names = ["404", "410", "small.png", "huge.png", "page", "half.png", "icon.bmp", "empty", "loop"]
    rows = fetched([f"{server.url}/{name}" for name in names], tmp_path, max_pixels=300 * 300)
    assert statuses(rows) == dict.fromkeys(names, "gone")
    assert rows["410"]["reason"] == "status 410"
    assert rows["small.png"]["reason"] == "20 x 20 pixels"
    assert "no picture" in rows["half.png"]["reason"] and "redirects" in rows["loop"]["reason"]
    assert server.asked.count("/loop") == 6
    assert not list(tmp_path.glob("*.png"))


def test_more_bytes_than_allowed_are_not_taken(server, tmp_path):
    rows = fetched([f"{server.url}/a.png"], tmp_path, max_bytes=100)
    assert rows["a.png"]["reason"] == "more than 100 bytes"


def test_the_servers_faults_are_tried_again_and_the_settled_not(server, tmp_path):
    names = ["a.png", "404", "500", "403", "cut"]
    urls = [f"{server.url}/{name}" for name in names]
    first = fetched(urls, tmp_path)
    assert statuses(first) == {"a.png": "got", "404": "gone", "500": "failed", "403": "failed", "cut": "failed"}
    server.asked.clear()
    assert fetched(urls, tmp_path) == first
    assert sorted(server.asked) == ["/403", "/500", "/cut"]
    server.asked.clear()
    fetched(urls, tmp_path, again=True)
    assert sorted(server.asked) == ["/403", "/404", "/500", "/cut"]


def test_a_picture_that_was_lost_or_changed_is_fetched_again(server, tmp_path):
    urls = [f"{server.url}/a.png", f"{server.url}/b.jpg"]
    first = fetched(urls, tmp_path)
    (tmp_path / first["a.png"]["file"]).unlink()
    (tmp_path / first["b.jpg"]["file"]).write_bytes(b"x")
    server.asked.clear()
    assert fetched(urls, tmp_path) == first
    assert sorted(server.asked) == ["/a.png", "/b.jpg"]
    assert (tmp_path / first["b.jpg"]["file"]).read_bytes() == picture(100, "JPEG")


def test_an_interrupted_run_goes_on(server, tmp_path, monkeypatch):
    urls = [f"{server.url}/{name}" for name in ("a.png", "404", "b.jpg")]
    usual = downloads._fetched

    def interrupted(url, *rest):
        if url.endswith(".jpg"):
            raise KeyboardInterrupt
        return usual(url, *rest)

    monkeypatch.setattr(downloads, "_fetched", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetched(urls, tmp_path, workers=1)
    monkeypatch.undo()
    kept = pd.read_csv(tmp_path / "record.csv", keep_default_na=False)
    assert set(kept["status"]) <= {"got", "gone"}
    server.asked.clear()
    assert statuses(fetched(urls, tmp_path)) == {"a.png": "got", "404": "gone", "b.jpg": "got"}
    assert "/b.jpg" in server.asked and len(server.asked) == 3 - len(kept)


def test_a_folder_with_another_record_is_named(tmp_path):
    (tmp_path / "record.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"record\.csv is no record of pictures.*delete it"):
        downloads.fetch([], tmp_path)


def test_a_server_that_does_not_answer_is_left(server, tmp_path):
    row = fetched([f"{server.url}/slow"], tmp_path, timeout=0.3)["slow"]
    assert row["status"] == "failed" and "timed out" in row["reason"]


def test_a_closed_port_and_an_unknown_host_have_failed(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/closed"
    rows = fetched([closed, "http://no-such-host.invalid/unknown"], tmp_path)
    assert statuses(rows) == {"closed": "failed", "unknown": "failed"}


# The guard


@pytest.mark.parametrize(
    "address, public",
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("64:ff9b::5db8:d822", True),  # NAT64 of a public address
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%1", False),
        ("fc00::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("::127.0.0.1", False),
        ("2002:7f00:1::", False),  # 6to4 of loopback
        ("64:ff9b::7f00:1", False),  # NAT64 of loopback
        ("64:ff9b::a9fe:a9fe", False),
        ("2001:0:7f00:1::", False),  # Teredo
    ],
)
def test_public_addresses_are_told_from_others(address, public):
    assert downloads.is_public(ip_address(address)) is public


FORBIDDEN = [
    "file:///etc/hostname",
    "ftp://127.0.0.1/a.png",
    "data:image/png;base64,AAAA",
    "gopher://127.0.0.1/",
    "//127.0.0.1/a.png",
    "http:///a.png",
    "http://[::1/a.png",
    "http://user:word@127.0.0.1/a.png",
    "http://127.0.0.1:99999/a.png",
    "http://a..b/a.png",
    "",
]


@pytest.mark.parametrize("url", FORBIDDEN)
def test_other_schemes_and_odd_urls_are_refused_under_any_rule(tmp_path, url):
    table = downloads.fetch([url], tmp_path, allowed=lambda address: True, progress=False)
    assert table["status"].tolist() == ["refused"]
    assert pd.read_csv(tmp_path / "record.csv", keep_default_na=False)["url"].tolist() == [url]


LOCAL = ["127.0.0.1", "127.1", "2130706433", "0x7f.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "10.0.0.1"]


@pytest.mark.parametrize("host", [*LOCAL, "169.254.169.254", "192.168.0.1", "[fe80::1]"])
def test_the_default_rule_refuses_addresses_that_are_not_public(server, tmp_path, host):
    table = downloads.fetch([f"http://{host}:{server.server_port}/a.png"], tmp_path, progress=False)
    assert table["status"].tolist() == ["refused"] and "not allowed" in table["reason"][0]
    assert server.asked == []


def test_redirects_are_followed_and_held_to_the_rule(server, tmp_path):
    with serving("127.0.0.2") as other:
        there = f"http://127.0.0.2:{other.server_port}/a.png"
        targets = ["/a.png", f"{server.url}/b.jpg", there, "file:///etc/hostname", "http://[::1/"]
        urls = [f"{server.url}/redirect?to={target}" for target in targets]
        table = downloads.fetch(urls, tmp_path, allowed=local, progress=False)
        assert table["status"].tolist() == ["got", "got", "refused", "refused", "refused"]
        assert other.asked == []
        table = downloads.fetch(urls[2:3], tmp_path, allowed=lambda address: True, again=True, progress=False)
        assert table["status"].tolist() == ["got"] and other.asked == ["/a.png"]


def test_all_addresses_of_a_name_must_be_allowed_and_the_checked_one_is_asked(server, tmp_path, monkeypatch):
    answers = [["127.0.0.1", "10.0.0.1"], ["127.0.0.1"]]
    asked = []

    def resolved(host, port, *rest, usual=socket.getaddrinfo, **options):
        if host != "pictures.example":
            return usual(host, port, *rest, **options)
        asked.append(host)
        found = answers[min(len(asked), 2) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    url = f"http://pictures.example:{server.server_port}/a.png"
    assert fetched([url], tmp_path)["a.png"]["status"] == "refused"
    assert fetched([url], tmp_path, again=True)["a.png"]["status"] == "got"
    assert asked == ["pictures.example"] * 2  # once a run: what was checked is not looked up again
    assert server.hosts == [f"pictures.example:{server.server_port}"]


def test_proxies_of_the_environment_are_not_used(server, tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    assert fetched([f"{server.url}/a.png"], tmp_path)["a.png"]["status"] == "got"


def test_a_certificate_of_another_name_or_of_nobody_is_not_taken(tmp_path, monkeypatch):
    files = certificate(tmp_path, "pictures.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    usual, resolve = downloads._context, socket.getaddrinfo

    def trusting():
        trusted = usual()
        trusted.load_verify_locations(files[0])
        return trusted

    names = ("pictures.example", "other.example")
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **o: resolve("127.0.0.1" if host in names else host, *rest, **o)
    )
    with serving(context=context) as server:
        urls = [f"https://{name}:{server.server_port}/a.png" for name in names]
        assert downloads.fetch(urls, tmp_path, allowed=local, progress=False)["status"].tolist() == ["failed"] * 2
        monkeypatch.setattr(downloads, "_context", trusting)
        assert downloads.fetch(urls, tmp_path, allowed=local, progress=False)["status"].tolist() == ["got", "failed"]


def certificate(folder, name):
    """A self-signed certificate of ``name`` and its key, as files."""
    files = folder / "certificate.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2".split()
    named = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    try:
        subprocess.run(
            [*command, *named, "-out", str(files[0]), "-keyout", str(files[1])], check=True, capture_output=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("needs the command openssl to make a certificate")
    return files


# Of a scenario


def webster(server, folder):
    """A scenario whose list has a picture that is there and one that is gone."""
    lines = [
        f'{{"caption": "an {n}", "url": "{server.url}/{n}", "index": {i}}}' for i, n in enumerate(["a.png", "404"])
    ]
    (folder / "list.jsonl").write_text("\n".join(lines))
    prompts = {"memorized": {"file": "list.jsonl", "format": "wen", "url": "https://example.org/list.jsonl"}}
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({**LEAST, "prompts": prompts, "references": {"from": "url"}}))
    return path


def test_references_of_a_scenario_stand_beside_its_prompts(server, tmp_path):
    scenario = scenarios.read(webster(server, tmp_path))
    table = scenarios.fetch_references(scenario, folder=tmp_path / "got", allowed=local, progress=False)
    assert table["prompt"].tolist() == ["an a.png", "an 404"] and table["status"].tolist() == ["got", "gone"]
    assert Image.open(table["attractor"][0]).size == (80, 80) and table["attractor"][1] == ""


def test_a_list_without_urls_has_nothing_to_fetch():
    with pytest.raises(ValueError, match="prompts of emoji-classes, memorized, come without urls"):
        scenarios.fetch_references(scenarios.read("emoji-classes"))


def test_the_command_counts_what_it_got(server, tmp_path, monkeypatch, capsys):
    path = webster(server, tmp_path)
    monkeypatch.setattr("sys.argv", ["basinlab", "references", str(path), "--folder", str(tmp_path / "got")])
    __main__.main()
    assert capsys.readouterr().out == "0 got, 0 gone, 2 refused, 0 failed\n"
