"""The one script that a page of ours has, where it is served: it asks whether there is a newer page, and puts the
sections that changed in place of the old ones.

Loading the whole page again would close what the reader has opened, and move what was scrolled to. So a section is
replaced only where its markup differs, what is open in it stays open, tables stay scrolled, and the keyboard stays
where it was. A section in which the reader has marked text waits until nothing is marked. A page that nobody looks at
asks for nothing.

Without scripts a browser loads the page again every few seconds: `REFRESH`.
"""

from __future__ import annotations

import base64
import hashlib

ASK_SECONDS = 1  # between two questions
REFRESH_SECONDS = 5  # between two whole pages, for a browser without scripts

# Of the page this script knows: <header>, <nav>, the sections in <main>, the JSON record, and a line with the id "live".
SCRIPT = """
"use strict";
const served = new Map();
const parts = root => new Map([
  ["header", root.querySelector("body > header")],
  ["nav", root.querySelector("body > nav")],
  ...[...root.querySelectorAll("main > section")].map(one => [one.id, one]),
  ["record", root.getElementById("record")],
].filter(([, one]) => one));
for (const [name, one] of parts(document)) served.set(name, one.outerHTML);
let tag = "";
let waiting = null;

function say(text) {
  const line = document.getElementById("live");
  if (line && line.textContent !== text) line.textContent = text;
}

function isMarked(one) {
  const marked = getSelection();
  return !marked.isCollapsed && marked.containsNode(one, true);
}

function exchange(old, fresh) {
  const both = kind => [[...old.querySelectorAll(kind)], [...fresh.querySelectorAll(kind)]];
  const [folded, unfolded] = both("details");
  folded.forEach((one, at) => { if (unfolded[at]) unfolded[at].open = one.open; });
  const [before, after] = both("a, summary, [tabindex]");
  const scrolled = before.map(one => [one.scrollLeft, one.scrollTop]);
  const focused = before.indexOf(document.activeElement);
  old.replaceWith(fresh);
  scrolled.forEach(([left, top], at) => { if (after[at]) after[at].scrollTo(left, top); });
  if (after[focused]) after[focused].focus({preventScroll: true});
}

function put(page) {
  document.title = page.title;
  const main = document.querySelector("main");
  const old = parts(document);
  let whole = true;
  let last = null;
  for (const [name, fresh] of parts(page)) {
    const text = fresh.outerHTML;
    const here = old.get(name);
    if (!here) {
      const copy = document.importNode(fresh, true);
      if (last) last.after(copy); else main.prepend(copy);
      served.set(name, text);
    } else if (served.get(name) !== text) {
      if (isMarked(here)) whole = false;
      else { exchange(here, document.importNode(fresh, true)); served.set(name, text); }
    }
    if (fresh.localName === "section") last = document.getElementById(name);
    old.delete(name);
  }
  for (const [name, gone] of old) { gone.remove(); served.delete(name); }
  return whole;
}

async function look() {
  if (!document.hidden) {
    try {
      const answer = await fetch(location.pathname, {headers: tag ? {"If-None-Match": tag} : {}});
      if (answer.status === 200) {
        waiting = new DOMParser().parseFromString(await answer.text(), "text/html");
        tag = answer.headers.get("ETag") || "";
      }
      if (waiting && put(waiting)) waiting = null;
      say("Live: this page follows the run.");
    } catch {
      say("Not live any more: mlxtune report --live has ended. What is here stays.");
    }
  }
  setTimeout(look, ASK_MILLISECONDS);
}
setTimeout(look, ASK_MILLISECONDS);
""".replace("ASK_MILLISECONDS", str(1000 * ASK_SECONDS)).strip()


def policy_source() -> str:
    """The script as a content security policy names it: by its digest, so that no other can run."""
    digest = hashlib.sha256(SCRIPT.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
