"""Examples to click: captions that the model knows, and pictures for the tabs that take some.

A click fills the fields of its tab, by `SCRIPT`: texts as if typed, pictures as if uploaded, so the
server sees nothing new. The pictures are Twemoji's, see ATTRIBUTION.
"""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from unclip_jax.weights.known import Known

ATTRIBUTION = "Example pictures: Twemoji, © Twitter and other contributors, CC-BY 4.0."

# For a model that doesn't say what it knows.
PROMPTS = ("a red apple", "a sunflower", "a cat", "a blue heart", "a pizza")

PAIRS = (("red_apple", "tangerine"), ("blue_heart", "red_apple"), ("cat_face", "sun_with_face"))
SINGLE = ("red_apple", "blue_heart", "cat_face", "sun_with_face")
TURNS = (  # a picture, what it shows, what it shall show
    ("blue_heart", "a blue heart", "a red heart"),
    ("red_apple", "a red apple", "a green apple"),
    ("cat_face", "a cat face", "a dog face"),
)

# Fills a tab's fields, copies a command, and says to screen readers what pictures show.
SCRIPT = """
(() => {
  const shown = (element) => element.offsetParent !== null;
  const within = (tab, selector) => [...tab.querySelectorAll(selector)].filter(shown);
  function type(tab, label, text) {
    const named = within(tab, '[data-testid=block-info]')
      .find((name) => name.textContent.trim() === label);
    const field = named?.closest('label, .block')?.querySelector('textarea, input');
    if (!field) return;
    Object.getOwnPropertyDescriptor(Object.getPrototypeOf(field), 'value').set.call(field, text);
    field.dispatchEvent(new Event('input', { bubbles: true }));
    return field;
  }
  function upload(tab, number, image) {
    const field = within(tab, '.block.upload')[number]?.querySelector('input[type=file]');
    if (!field) return;
    const bytes = Uint8Array.from(atob(image.src.split(',')[1]), (c) => c.charCodeAt(0));
    const given = new DataTransfer();
    given.items.add(new File([bytes], image.dataset.name, { type: 'image/png' }));
    field.files = given.files;
    field.dispatchEvent(new Event('change', { bubbles: true }));
  }
  async function copy(button) {
    const command = button.closest('section').querySelector('pre');
    try {
      await navigator.clipboard.writeText(command.textContent);
    } catch {  // not allowed where the page came without encryption from another machine
      getSelection().selectAllChildren(command);
      document.execCommand('copy');
    }
    button.textContent = 'Copied';
    setTimeout(() => (button.textContent = 'Copy'), 2000);
  }
  document.addEventListener('click', async (event) => {
    const button = event.target.closest?.('button.example, button.copy');
    if (!button) return;
    if (button.matches('.copy')) return copy(button);
    const tab = button.closest('.tabitem') ?? document;
    let field;
    for (const [label, text] of Object.entries(JSON.parse(button.dataset.fill)))
      field = type(tab, label, text) ?? field;
    for (const [i, image] of [...button.querySelectorAll('img')].entries())
      upload(tab, i, image);
    field?.focus();
  });
  // On a phone the pictures are below the form.
  const draws = (event) => event.target.closest?.('button.draw') ||
    (event.key === 'Enter' && !event.shiftKey && event.target.matches('input, textarea'));
  for (const kind of ['click', 'keydown'])
    document.addEventListener(kind, (event) => {
      if (innerWidth > 640 || !draws(event)) return;
      const status = event.target.closest('.tabitem')?.querySelector('.said');
      setTimeout(() => status?.scrollIntoView({ behavior: 'smooth', block: 'start' }), 300);
    });
  new MutationObserver(() => {
    for (const image of document.querySelectorAll('img:not([alt]), img[alt=""]')) {
      const label = image.closest('.block')?.querySelector('[data-testid=block-label], label');
      image.alt = label?.textContent.trim() || 'picture';
    }
  }).observe(document, { childList: true, subtree: true });
})();
"""
HEAD = f"<script>{SCRIPT}</script>"


def prompts(known: Known | None, count: int = 5) -> list[str]:
    """Captions to try."""
    if known is None:
        return list(PROMPTS)
    return [known.styled(known.names.index(n), i) for i, n in enumerate(known.examples(count))]


def row(examples: Sequence[str], title: str = "Try") -> str:
    """The buttons, after a word."""
    return f'<div class="examples"><span>{escape(title)}</span>{"".join(examples)}</div>'


def button(shown: str, texts: Mapping[str, str], files: Sequence[str] = ()) -> str:
    """One example.

    Args:
        shown: what the button says; "" where its pictures say it.
        texts: labels of fields -> what goes into them.
        files: pictures for the fields that take some, in order.
    """
    images = "".join(map(_image, files))
    fill = escape(json.dumps(dict(texts)))
    said = f"<span>{escape(shown)}</span>" if shown else ""
    return f'<button type="button" class="example" data-fill="{fill}">{images}{said}</button>'


def near(names: Sequence[str], label: str) -> str:
    """Names to take in place of a caption, for the field of a label."""
    return "".join(button(name, {label: name}) for name in names)


def captions(known: Known | None, label: str) -> str:
    """Captions to click, for the field of a label."""
    return row([button(prompt, {label: prompt}) for prompt in prompts(known)])


def single() -> str:
    """One picture each."""
    return row([button("", {}, [file]) for file in SINGLE])


def pairs() -> str:
    """Two pictures each."""
    return row([button("", {}, files) for files in PAIRS])


def turns(source: str | None, to: str | None) -> str:
    """A picture with what it shows and what it shall show, for the fields of these labels."""
    return row(
        [
            button(goal if to else "", {k: v for k, v in ((source, was), (to, goal)) if k}, [file])
            for file, was, goal in TURNS
        ]
    )


@functools.cache
def _image(name: str) -> str:
    data = (Path(__file__).parent / "pictures" / f"{name}.png").read_bytes()
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<img src="{source}" alt="{name.replace("_", " ")}" data-name="{name}.png">'
