"""CITATION.cff is what citation tools read (citation-file-format.github.io)."""

import pathlib

import yaml

_CITATION = yaml.safe_load(pathlib.Path("CITATION.cff").read_text())


def test_required_keys():
  assert _CITATION["cff-version"] == "1.2.0"
  assert _CITATION["message"] and _CITATION["title"]
  assert [a["name"] for a in _CITATION["authors"]] == [
    "The LookupViT in JAX authors"
  ]
  assert _CITATION["license"] == "Apache-2.0"
  # Of the file format, and no others.
  assert set(_CITATION) <= {
    *("cff-version", "message", "type", "title", "abstract", "authors"),
    *(
      "license",
      "keywords",
      "preferred-citation",
      "repository-code",
      "version",
    ),
  }


def test_paper():
  paper = _CITATION["preferred-citation"]
  assert {"type", "title", "authors"} <= set(paper)
  names = [f"{a['given-names']} {a['family-names']}" for a in paper["authors"]]
  assert names == [
    *("Rajat Koner", "Gagan Jain", "Prateek Jain", "Volker Tresp"),
    "Sujoy Paul",
  ]
  assert paper["title"].startswith("LookupViT: Compressing visual information")
  assert paper["year"] == 2024 and paper["url"].endswith("/2407.12753")
  assert paper["doi"].startswith("10.")
