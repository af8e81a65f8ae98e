"""A bucket on this machine, which TensorFlow takes for one of gs://.

It answers the requests of TensorFlow's file system (the JSON interface of
Cloud Storage, https://cloud.google.com/storage/docs/json_api): metadata, lists,
reads of ranges, uploads, copies and deletions.
"""

import contextlib
import http.server
import json
import pathlib
import re
import ssl
import threading
import urllib.parse

import trustme


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    pass

  def do_CONNECT(self):  # As a proxy for Google's hosts.
    self.send_response(200)
    self.end_headers()
    self.connection = self.server.tls.wrap_socket(
      self.connection, server_side=True
    )
    self.rfile = self.connection.makefile("rb")
    self.wfile = self.connection.makefile("wb", 0)
    self.close_connection = False

  def do_GET(self):
    path, query = self._url()
    if objects := re.fullmatch(r"/storage/v1/b/[^/]+/o(/.+)?", path):
      name = objects[1]
      return self._list(query) if name is None else self._stat(name[1:])
    if re.fullmatch(r"/storage/v1/b/[^/]+", path):
      return self._answer(200, {})
    return self._read(path.split("/", 2)[2])

  def do_POST(self):
    path, query = self._url()
    body = self._body()
    if self.server.read_only:
      return self._answer(403, {})
    if path.startswith("/upload/"):
      if query["uploadType"] == "media":
        return self._write(query["name"], body)
      location = f"https://www.googleapis.com/put/{query['name']}"
      return self._answer(200, {}, Location=location)
    source, target = re.fullmatch(
      r"/storage/v1/b/[^/]+/o/(.+)/rewriteTo/b/[^/]+/o/(.+)", path
    ).groups()
    content = self._file(source).read_bytes()
    self._write(target, content, {"done": True})

  def do_PUT(self):
    path, _ = self._url()
    self._write(path.removeprefix("/put/"), self._body())

  def do_DELETE(self):
    file = self._file(re.fullmatch(r"/.+?/o/(.+)", self._url()[0])[1])
    if not file.is_file():
      return self._answer(404, {})
    file.unlink()
    self._answer(204)

  def _body(self):
    if self.headers["Transfer-Encoding"] != "chunked":
      return self.rfile.read(int(self.headers.get("Content-Length", 0)))
    chunks = []
    while not chunks or chunks[-1]:
      chunks.append(self.rfile.read(int(self.rfile.readline(), 16)))
      self.rfile.readline()
    return b"".join(chunks)

  def _url(self):
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    return urllib.parse.unquote(url.path), query

  def _file(self, name):
    return self.server.root / name

  def _answer(self, code, content=b"", **headers):
    body = content if isinstance(content, bytes) else json.dumps(content)
    body = body if isinstance(body, bytes) else body.encode()
    self.send_response(code)
    for key, value in headers.items():
      self.send_header(key, value)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def _stat(self, name):
    file = self._file(name)
    if not file.is_file():
      return self._answer(404, {})
    fields = {"size": str(file.stat().st_size), "generation": "1"}
    self._answer(200, fields | {"updated": "2020-01-01T00:00:00.000Z"})

  def _list(self, query):
    root, prefix = self.server.root, query.get("prefix", "")
    names, folders = [], {}
    for file in sorted(root.rglob("*")):
      name = file.relative_to(root).as_posix()
      if not file.is_file() or not name.startswith(prefix):
        continue
      head, slash, _ = name[len(prefix) :].partition("/")
      if slash and "delimiter" in query:
        folders[f"{prefix}{head}/"] = None
      else:
        names.append({"name": name})
    most = int(query.get("maxResults", len(names)))
    self._answer(200, {"items": names[:most], "prefixes": list(folders)})

  def _read(self, name):
    file = self._file(name)
    if not file.is_file():
      return self._answer(404)
    spec = self.headers.get("Range", "bytes=0-999999999999")
    first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", spec).groups())
    with file.open("rb") as stream:
      stream.seek(first)
      content = stream.read(last + 1 - first)
    if not content:
      return self._answer(416)
    with self.server.lock:
      self.server.sent += len(content)
      self.server.asked = max(self.server.asked, last + 1 - first)
    self._answer(206, content)

  def _write(self, name, content, answer=None):
    file = self._file(name)
    if name.endswith("/"):  # It stands for a directory.
      file.mkdir(parents=True, exist_ok=True)
    else:
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_bytes(content)
    self._answer(200, answer or {})


@contextlib.contextmanager
def serve(root: pathlib.Path, folder: pathlib.Path):
  """Serves a directory as every bucket.

  Args:
    root: the directory.
    folder: where to put a certificate.

  Yields:
    The server, which counts the bytes of objects that it `sent`, and knows the
    largest range that was `asked` for; it refuses uploads where it is
    `read_only`. And the environment of a program that is to use it.
  """
  authority = trustme.CA()
  authority.cert_pem.write_to_path(str(folder / "ca.pem"))
  tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
  hosts = ("www.googleapis.com", "storage.googleapis.com")
  authority.issue_cert(*hosts).configure_cert(tls)
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
  server.daemon_threads = True
  server.tls, server.root = tls, root
  server.sent, server.asked, server.read_only = 0, 0, False
  server.lock = threading.Lock()
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  env = {
    "https_proxy": f"http://127.0.0.1:{server.server_port}",
    "CURL_CA_BUNDLE": str(folder / "ca.pem"),
    "NO_GCE_CHECK": "true",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
  }
  try:
    yield server, env
  finally:
    server.shutdown()
    thread.join()
    server.server_close()
