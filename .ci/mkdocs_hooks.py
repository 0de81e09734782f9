"The hooks of mkdocs.yml, explained in nbs/11_readme.ipynb. MkDocs loads a hook as a lone file, which a module of a package is not."
from daclip_repro.readme import on_files, on_page_content

__all__ = ["on_files", "on_page_content"]
