"""
A stand-in for the Hugging Face hub on loopback: the few routes that huggingface_hub and datasets
ask for, over a folder of repositories. Names decide what goes wrong: a repository called `gated`
answers 401; of one called `broken`, or a file so named, every large answer breaks off in its middle
until `repaired`.

    with StandInHub(folder) as hub: run a command with **hub.environment
    folder/models/OWNER/NAME/...  folder/datasets/OWNER/NAME/...
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

COMMIT = '0123456789abcdef0123456789abcdef01234567'


class Handler(BaseHTTPRequestHandler):
    """Answers GET, HEAD and POST."""

    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def do_POST(self):
        """The only question by POST is which paths exist: /api/KIND/NAME/paths-info/REVISION."""
        body = self.rfile.read(int(self.headers['Content-Length'])).decode()
        is_json = 'json' in self.headers['Content-Type']
        wanted = json.loads(body)['paths'] if is_json else [path for _, path in parse_qsl(body)]
        kind, name, _ = self.split()
        root = self.server.folder / kind / name
        self.send_json([entry(root, root / path) for path in wanted if (root / path).exists()])

    def split(self):
        """(kind, repository, the rest of the path); the oldest models have no owner."""
        kind, *parts = map(unquote, urlsplit(self.path).path.strip('/').split('/'))
        if kind == 'api':
            kind, *parts = parts
        elif kind != 'datasets':
            kind, parts = 'models', [kind, *parts]
        ends = 1 if parts[1:2] in ([], ['resolve'], ['revision'], ['tree']) else 2
        return kind, '/'.join(parts[:ends]), parts[ends:]

    def do_GET(self):
        self.server.requests.append(f'{self.command} {self.path}')
        kind, name, rest = self.split()
        root = self.server.folder / kind / name
        if name.endswith('/gated') or not root.is_dir():  # 401 for strangers, as the hub does
            return self.send(401, code='GatedRepo' if root.is_dir() else 'RepoNotFound')
        path = root / '/'.join(rest[2:])
        if rest[:1] == ['resolve']:
            return self.send_file(path, name)
        if rest[:1] == ['tree'] and path.is_dir():
            found = path.rglob('*') if 'recursive=true' in self.path else path.iterdir()
            return self.send_json([entry(root, path) for path in sorted(found)])
        if rest[:1] == ['tree']:
            return self.send(404, code='EntryNotFound')
        files = [entry(root, path)['path'] for path in sorted(root.rglob('*')) if path.is_file()]
        info = dict(id=name, sha=COMMIT, siblings=[dict(rfilename=file) for file in files])
        return self.send_json(info | dict(private=False, gated=False, tags=[], cardData={}))

    do_HEAD = do_GET

    def send_json(self, content):
        self.send(200, json.dumps(content).encode(), Content_Type='application/json')

    def send_file(self, path, name):
        """A file, or the part of it that a Range header asks for."""
        if not path.is_file():
            return self.send(404, code='EntryNotFound')
        body, status, more = path.read_bytes(), 200, {}
        etag, total = hashlib.sha1(body).hexdigest(), len(body)
        if 'Range' in self.headers:
            first, _, last = self.headers['Range'].removeprefix('bytes=').partition('-')
            body, status = body[int(first) : int(last) + 1 if last else None], 206
            more = dict(Content_Range=f'bytes {first}-{int(first) + len(body) - 1}/{total}')
        more |= dict(Content_Length=str(len(body)), ETag=f'"{etag}"', Accept_Ranges='bytes')
        if 'broken' in name + path.name and not self.server.repaired and len(body) > 2000:
            body, self.close_connection = body[: len(body) // 2], True
        return self.send(status, body, **more)

    def send(self, status, body=b'', code=None, **headers):
        self.send_response(status)
        headers = dict(Content_Length=str(len(body)), X_Repo_Commit=COMMIT) | headers
        headers |= dict(X_Error_Code=code, X_Error_Message=code) if code else {}
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        self.wfile.write(body if self.command != 'HEAD' else b'')


def entry(root, path):
    """A file or folder as the hub's tree lists it."""
    body = path.read_bytes() if path.is_file() else b''
    kind, name = 'file' if path.is_file() else 'directory', path.relative_to(root).as_posix()
    return dict(type=kind, path=name, size=len(body), oid=hashlib.sha1(body).hexdigest())


class StandInHub(ThreadingHTTPServer):
    """The server, as a context manager; `requests` are what was asked, in order."""

    def __init__(self, folder):
        super().__init__(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.folder, self.requests, self.repaired = folder, [], False
        self.environment = dict(  # of a process that asks the stand-in and nobody else
            HF_ENDPOINT=f'http://127.0.0.1:{self.server_port}',
            HF_HOME=str(folder / 'cache'),
            HF_HUB_OFFLINE='0',
            HF_HUB_DISABLE_XET='1',
            HF_HUB_DISABLE_TELEMETRY='1',
            NO_PROXY='127.0.0.1',
        )

    def __exit__(self, *error):
        self.shutdown()
        super().__exit__(*error)
