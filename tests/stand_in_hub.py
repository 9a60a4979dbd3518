"""
A stand-in for the Hugging Face hub on loopback: the few routes that huggingface_hub and datasets
ask for, over a folder of repositories. Names decide what goes wrong: a repository called `gated`
answers 401; one called `broken`, or a file so named, stops in the middle of every large answer
until the hub is mended.

    with StandInHub(folder) as hub: run a command with **hub.environment
    folder/models/OWNER/NAME/...  folder/datasets/OWNER/NAME/...
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = '0123456789abcdef0123456789abcdef01234567'


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD."""

    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        """The only question by POST is which paths exist: /api/KIND/NAME/paths-info/REVISION."""
        length = int(self.headers.get('Content-Length', 0))
        body = self.rfile.read(length).decode()
        kind, name, _ = self.split()
        if 'json' in self.headers.get('Content-Type', ''):
            wanted = json.loads(body)['paths']
        else:
            wanted = [
                unquote(part.partition('=')[2]) for part in body.split('&') if 'paths' in part
            ]
        root = self.server.folder / kind / name
        self.send_json([entry(root, root / path) for path in wanted if (root / path).exists()])

    def split(self):
        """(kind, repository, the rest of the path); the oldest models have no owner."""
        parts = [unquote(part) for part in urlsplit(self.path).path.strip('/').split('/')]
        kind = 'models'
        if parts[0] == 'api':
            kind, parts = parts[1], parts[2:]
        elif parts[0] == 'datasets':
            kind, parts = parts[0], parts[1:]
        ends = 1 if parts[1:2] in ([], ['resolve'], ['revision'], ['tree']) else 2
        return kind, '/'.join(parts[:ends]), parts[ends:]

    def answer(self):
        """Route a request."""
        self.server.requests.append(f'{self.command} {self.path}')
        if urlsplit(self.path).path == '/':
            return self.send_json({})
        kind, name, rest = self.split()
        root = self.server.folder / kind / name
        if name.endswith('/gated'):
            return self.send_error_code(401, 'GatedRepo')
        if not root.is_dir():
            return self.send_error_code(401, 'RepoNotFound')  # as the hub does for strangers
        if rest[:1] == ['resolve']:
            path = root / '/'.join(rest[2:])
            broken = name.endswith('/broken') or 'broken' in path.name
            return self.send_file(path, broken and not self.server.mended)
        files = sorted(path for path in root.rglob('*') if path.is_file())
        if rest[:1] == ['tree']:
            under = root / '/'.join(rest[2:])
            if not under.is_dir():
                return self.send_error_code(404, 'EntryNotFound')
            found = under.rglob('*') if 'recursive=true' in self.path else under.iterdir()
            return self.send_json([entry(root, path) for path in sorted(found)])
        siblings = [dict(rfilename=path.relative_to(root).as_posix()) for path in files]
        info = dict(id=name, sha=COMMIT, siblings=siblings, private=False, gated=False, tags=[])
        return self.send_json(info | dict(cardData={}, downloads=0, likes=0))

    def send_json(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.send_header('X-Repo-Commit', COMMIT)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def send_error_code(self, status, code):
        self.send_response(status)
        self.send_header('X-Error-Code', code)
        self.send_header('X-Error-Message', f'{code} at the stand-in')
        self.send_header('Content-Length', '0')
        self.end_headers()

    def send_file(self, path, broken):
        """A file, or the part of it that a Range header asks for."""
        if not path.is_file():
            return self.send_error_code(404, 'EntryNotFound')
        body, status = path.read_bytes(), 200
        etag = hashlib.sha1(body).hexdigest()
        total, start = len(body), 0
        if 'Range' in self.headers:
            first, _, last = self.headers['Range'].removeprefix('bytes=').partition('-')
            start, status = int(first), 206
            body = body[start : int(last) + 1 if last else None]
        self.send_response(status)
        self.send_header('ETag', f'"{etag}"')
        self.send_header('X-Repo-Commit', COMMIT)
        self.send_header('Accept-Ranges', 'bytes')
        self.send_header('Content-Length', str(len(body)))
        if status == 206:
            self.send_header('Content-Range', f'bytes {start}-{start + len(body) - 1}/{total}')
        self.end_headers()
        if self.command == 'HEAD':
            return None
        if broken and len(body) > 2000:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.close()
        return self.wfile.write(body)


def entry(root, path):
    """A file or folder as the hub's tree lists it."""
    if path.is_dir():
        return dict(type='directory', path=path.relative_to(root).as_posix(), oid='0', size=0)
    body = path.read_bytes()
    oid = hashlib.sha1(body).hexdigest()
    name = path.relative_to(root).as_posix()
    return dict(type='file', path=name, size=len(body), oid=oid)


class StandInHub:
    """The server, as a context manager."""

    def __init__(self, folder):
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.folder, self.server.requests = Path(folder), []
        self.server.mended = False
        self.server.daemon_threads = True

    @property
    def requests(self):
        """What was asked, in order."""
        return self.server.requests

    def mend(self):
        """From now on nothing breaks off."""
        self.server.mended = True

    @property
    def environment(self):
        """What a process needs to ask the stand-in and nobody else."""
        cache = self.server.folder / 'cache'
        return dict(
            HF_ENDPOINT=f'http://127.0.0.1:{self.server.server_port}',
            HF_HOME=str(cache),
            HF_HUB_OFFLINE='0',
            HF_HUB_DISABLE_XET='1',
            HF_HUB_DISABLE_TELEMETRY='1',
            NO_PROXY='127.0.0.1',
        )

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
