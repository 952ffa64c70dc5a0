"""The one script that a page of ours has, where it is served: it asks whether there is a newer page, and puts the
sections that changed in place of the old ones.

Loading the whole page again would close what the reader has opened, and move what was scrolled to. So a section is
replaced only where its markup differs, what is open in it stays open, tables stay scrolled, and the keyboard stays
where it was. A section in which the reader has marked text waits until nothing is marked. A page that nobody looks at
asks for nothing.

Without scripts a browser loads the whole page again every few seconds.
"""

from __future__ import annotations

import base64
import hashlib

ASK_SECONDS = 1  # between two questions
REFRESH_SECONDS = 5  # between two whole pages, for a browser without scripts

# Of the page it knows: <header>, <nav>, the sections in <main>, the JSON record, and a line with the id "live".
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
  const head = one => one?.querySelector("summary")?.textContent;
  folded.forEach((one, at) => { if (head(one) === head(unfolded[at])) unfolded[at].open = one.open; });
  const [before, after] = both("a, summary, [tabindex]");
  const scrolled = before.map(one => [one.scrollLeft, one.scrollTop]);
  const focused = before.indexOf(document.activeElement);
  old.replaceWith(fresh);
  scrolled.forEach(([left, top], at) => { if (after[at]) after[at].scrollTo(left, top); });
  if (after[focused]) after[focused].focus({preventScroll: true});
}

function insert(fresh, before) {
  const copy = document.importNode(fresh, true);
  if (fresh.localName === "section") before.after(copy);
  else document.querySelector("body > header").after(copy);
}

function put(page) {
  document.title = page.title;
  const old = parts(document);
  let isWhole = true;
  let before = document.getElementById("live");
  for (const [name, fresh] of parts(page)) {
    const text = fresh.outerHTML;
    const here = old.get(name);
    if (!here) {
      insert(fresh, before);
      served.set(name, text);
    } else if (served.get(name) !== text) {
      if (isMarked(here)) isWhole = false;
      else {
        exchange(here, document.importNode(fresh, true));
        served.set(name, text);
      }
    }
    if (fresh.localName === "section") before = document.getElementById(name);
    old.delete(name);
  }
  for (const [name, gone] of old) {
    gone.remove();
    served.delete(name);
  }
  return isWhole;
}

async function ask() {
  let answer;
  try {
    answer = await fetch(location.pathname, {headers: tag ? {"If-None-Match": tag} : {}});
    if (answer.status === 200) {
      waiting = new DOMParser().parseFromString(await answer.text(), "text/html");
      tag = answer.headers.get("ETag");
    }
  } catch {
    return "Not live any more: mlxtune report --live has ended. What is here stays.";
  }
  if (waiting !== null && put(waiting)) waiting = null;
  if (answer.status === 200 || answer.status === 304) return "Live: this page follows the run.";
  return "The page cannot be made just now. What is here stays until it can.";
}

async function look() {
  if (!document.hidden) say(await ask());
  setTimeout(look, ASK_MILLISECONDS);
}
setTimeout(look, ASK_MILLISECONDS);
""".replace("ASK_MILLISECONDS", str(1000 * ASK_SECONDS)).strip()

# By which a content security policy names the script, so that no other can run.
SCRIPT_HASH = "sha256-" + base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
