"""What our Python-Markdown extensions have in common: each registers one processor."""

from markdown.extensions import Extension


def extension(kind: str, processor: type, name: str, priority: float):
    """The `makeExtension` of a module that registers a processor of this kind."""

    class Made(Extension):
        def extendMarkdown(self, md):
            getattr(md, kind).register(processor(md), name, priority)

    return lambda **options: Made(**options)
