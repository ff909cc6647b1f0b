"""MkDocs hooks, as thin as can be: what is taken away, and the stamp of each page."""

from pathlib import Path

from mkdocs.structure.files import File

from tools import claims, ledger, notebooks, sources


def on_files(files, config):
    """Offer every snippet for download, under its own path."""
    for path in sorted(Path("snippets").rglob("*.py")):
        name = path.as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path.resolve())))
    return files


def on_page_content(html, page, config, files):
    """Keep code out of the search index: words are looked for, and it is heavy."""
    return html.replace(' highlight">', ' highlight" data-search-exclude>')


def on_page_context(context, page, config, nav):
    """What the template can't know: the page's snippet, and its last run."""
    source, name = f"docs/{page.file.src_uri}", page.file.src_uri.rpartition(".")[0]
    snippet = sources.snippet(name, page.meta)
    context["snippet"] = snippet if Path(snippet).exists() else None
    context["stamp"] = ledger.stamp(source, _ledger)
    context["verdicts"] = _verdicts
    context["colab"] = notebooks.colab(config, name)
    return context


def on_pre_build(config):
    _verdicts.clear()
    for found in claims.judged().values():
        word = found["verdict"]
        if word in claims.SIGNS:
            listed = _verdicts.setdefault(f"{found['page']}.md", {"signs": []})
            listed["signs"].append((word, claims.SIGNS[word]))
    for listed in _verdicts.values():
        listed["words"] = claims.tally([word for word, _ in listed["signs"]])


def on_env(env, config, files):
    """Write every page as a notebook and as Markdown beside it, in the nav's order."""
    _ledger.clear()
    _ledger.update(ledger.read())  # labs have run by now
    pages = {file.src_uri: file.page for file in files.documentation_pages()}
    notebooks.publish([pages[name] for _, name in sources.in_order()], config)


_ledger: dict = {}
_verdicts: dict = {}
