"""Makes the page of a blind vote: one HTML file that asks pair after pair, and gives the answers back as JSON.

It needs no network and no other file. What it holds says nothing of who drew what: pictures are numbered in the order
in which they are shown, without names or metadata. A half-done vote is kept in the browser (localStorage). From a
local server (`ambergrade vote --serve`) the page sends its answers itself; opened as a file it saves them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from ambergrade.errors import BadInput, BadSetting
from ambergrade.score.html import data
from ambergrade.typed import settings

FORMAT = "ambergrade vote 1"
CHOICES = ("left", "right", "tie")
SIDE = 1024
"""Longest side of a picture on the page, pixels."""
LONGEST_NAME = 60


@dataclass(frozen=True)
class Shown:
    """A pair as the page lays it out."""

    left: npt.NDArray[np.uint8]
    right: npt.NDArray[np.uint8]
    text: str
    """The prompt."""


@dataclass(frozen=True)
class Answers:
    """What the page gives back."""

    format: str
    ballot: str
    """Identity of the page that was answered."""
    voter: str
    answers: tuple[str, ...]
    """One of CHOICES for each pair, in the page's order; a vote that was ended early has fewer than there are pairs."""

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise BadSetting(f"format is {self.format[:40]!r}, {FORMAT!r} is needed.")
        if len(self.voter) > LONGEST_NAME or not self.voter.isprintable():
            raise BadSetting(f"voter: at most {LONGEST_NAME} printable letters are meant.")
        wrong = [answer[:20] for answer in self.answers if answer not in CHOICES]
        if wrong:
            raise BadSetting(f"answers: {', '.join(CHOICES)} are meant, found {wrong[:3]}.")
        if not self.answers:
            raise BadSetting("answers: none is there.")

    @classmethod
    def read(cls, text: bytes, source: str) -> Answers:
        """Read a result. Raises BadInput for anything but what the page writes."""
        try:
            found: Any = json.loads(text)
            if not isinstance(found, Mapping):
                raise ValueError("no object")
            return settings(cls, found)
        except (ValueError, RecursionError, BadSetting) as error:
            raise BadInput(
                f"{source} is no result of a vote: {str(error)[:300]}\nGive the file that the page saved."
            ) from None


def vote_page(ballot: str, question: str, pairs: Sequence[Shown]) -> str:
    """Return the page's HTML. `ballot`: its identity, which the answers carry back."""
    pictures: dict[str, int] = {}
    rows = []
    for pair in pairs:
        sides = [pictures.setdefault(data(pixels, SIDE), len(pictures)) for pixels in (pair.left, pair.right)]
        rows.append([*sides, pair.text])
    asked = {"format": FORMAT, "ballot": ballot, "pictures": list(pictures), "pairs": rows}
    held = json.dumps(asked, ensure_ascii=True).replace("<", "\\u003c")  # no text can end the script element
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(question)}</title><style>{_STYLE}</style></head><body>"
        f"{_BODY.format(question=escape(question), name=LONGEST_NAME)}"
        f'<script type="application/json" id="asked">{held}</script><script>{_SCRIPT}</script></body></html>'
    )


_STYLE = """
:root{--ink:#29242e;--soft:#766e78;--line:#e4dfd8;--paper:#fbf9f5;--card:#fff;--amber:#de8e1e;--wash:#fdeed2}
*{box-sizing:border-box}html,body{height:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.45 system-ui,sans-serif;display:flex;
flex-direction:column;border-top:6px solid var(--amber)}
header{display:flex;align-items:baseline;gap:16px;padding:14px 24px 8px}
h1{font-size:20px;margin:0;flex:1}#count{color:var(--soft);font-variant-numeric:tabular-nums}
#bar{height:4px;background:var(--line);margin:0 24px}#bar div{height:100%;width:0;background:var(--amber);
transition:width .12s}
#vote{flex:1;min-height:0;display:flex;flex-direction:column;padding:14px 24px 18px}
#sides{flex:1;min-height:0;display:grid;grid-template-columns:1fr 1fr;gap:18px}
.side{min-height:0;min-width:0;padding:10px;border:2px solid var(--line);border-radius:12px;background:var(--card);
cursor:pointer;display:flex;align-items:center;justify-content:center}
.side:hover,.side:focus-visible{border-color:var(--amber);background:var(--wash);outline:0}
.side img{max-width:100%;max-height:100%;width:100%;height:100%;object-fit:contain}
.side img.small{image-rendering:pixelated}
#text{margin:10px 0 12px;color:var(--soft);text-align:center;max-height:4.4em;overflow-y:auto;overflow-wrap:anywhere}
#buttons{display:grid;grid-template-columns:1fr auto 1fr;gap:12px;align-items:center}
#buttons div{display:flex;gap:10px}button,a.button{font:inherit;color:inherit;background:var(--card);
border:1px solid var(--line);border-radius:8px;padding:8px 16px;cursor:pointer;text-decoration:none}
button:hover,a.button:hover{border-color:var(--amber)}button:disabled{opacity:.4;cursor:default}
.main{background:var(--amber)!important;border-color:var(--amber)!important;color:#fff!important;font-weight:600}
kbd{font:12px ui-monospace,monospace;border:1px solid var(--line);border-bottom-width:2px;border-radius:4px;
padding:1px 6px;background:var(--card);color:var(--ink)}
.keys{color:var(--soft);font-size:13px}.right{justify-content:flex-end;align-items:center}
#done{max-width:560px;margin:8vh auto;padding:0 24px}#done h2{font-size:22px;margin:0 0 8px}
#done p{margin:8px 0}#done .row{display:flex;gap:10px;flex-wrap:wrap;margin:18px 0}
input{font:inherit;padding:8px 12px;border:1px solid var(--line);border-radius:8px;width:100%;background:var(--card)}
label{color:var(--soft);display:block;margin-top:14px}[hidden]{display:none!important}
#told{font-weight:600}
"""

_BODY = """
<header><h1>{question}</h1><span id="count"></span></header><div id="bar"><div></div></div>
<section id="vote"><div id="sides"><div class="side" id="left" role="button" tabindex="0" aria-label="left picture">
<img alt=""></div><div class="side" id="right" role="button" tabindex="0" aria-label="right picture"><img alt=""></div>
</div><p id="text"></p><div id="buttons"><div><button id="undo">Undo <kbd>U</kbd></button></div>
<div><button id="tie">No difference <kbd>↓</kbd></button></div><div class="right keys"><span><kbd>←</kbd> or
<kbd>1</kbd> left, <kbd>→</kbd> or <kbd>2</kbd> right, <kbd>↓</kbd> or <kbd>0</kbd> tie</span>
<button id="stop">Stop here</button></div></div></section>
<section id="done" hidden><h2 id="head"></h2><p id="what"></p>
<label>Your name, if you like <input id="voter" maxlength="{name}" autocomplete="off"></label>
<div class="row"><button id="send" class="main">Send the answers</button>
<button id="save">Save the answers</button><button id="back">Go back</button></div><p id="told" role="status"></p>
</section>
"""

_SCRIPT = """
"use strict";
const asked=JSON.parse(document.getElementById("asked").textContent),at=id=>document.getElementById(id);
const key="ambergrade vote "+asked.ballot,served=location.protocol.startsWith("http");
let answers=[],stopped=false;
try{const kept=JSON.parse(localStorage.getItem(key)||"{}");answers=(kept.answers||[]).slice(0,asked.pairs.length);
at("voter").value=kept.voter||""}catch{}
const keep=()=>{try{localStorage.setItem(key,JSON.stringify({answers,voter:at("voter").value}))}catch{}};
const images={left:document.querySelector("#left img"),right:document.querySelector("#right img")};
const over=()=>stopped||answers.length===asked.pairs.length;
function show(){
const all=asked.pairs.length,now=answers.length;
at("count").textContent=over()?`${now} of ${all} answered`:`${now+1} of ${all}`;
document.querySelector("#bar div").style.width=100*now/all+"%";
at("vote").hidden=over();at("done").hidden=!over();at("undo").disabled=!now;at("stop").disabled=!now;
if(over()){at("head").textContent=now===all?"That was the last pair.":`${now} of ${all} pairs are answered.`;
at("what").textContent=served?"Send your answers; the command that showed this page is waiting for them.":
"Save your answers as a file, and give it to who sent you this page: ambergrade vote --result FILE.json";
at("send").hidden=!served;at("save").className=served?"":"main";at("told").textContent="";return}
const [left,right,text]=asked.pairs[now];
for(const [side,number] of [["left",left],["right",right]])images[side].src=asked.pictures[number];
at("text").textContent=text;
const next=asked.pairs[now+1];if(next)for(const number of next.slice(0,2))new Image().src=asked.pictures[number]}
for(const image of Object.values(images))image.addEventListener("load",()=>
image.classList.toggle("small",Math.max(image.naturalWidth,image.naturalHeight)<=256));
function answer(choice){if(over())return;answers.push(choice);keep();show()}
function undo(){if(!answers.length)return;stopped=false;answers.pop();keep();show()}
for(const side of ["left","right"]){at(side).addEventListener("click",()=>answer(side));
at(side).addEventListener("keydown",event=>{
if(event.key==="Enter"||event.key===" "){event.preventDefault();answer(side)}})}
at("tie").addEventListener("click",()=>answer("tie"));at("undo").addEventListener("click",undo);
at("stop").addEventListener("click",()=>{stopped=true;show()});
at("back").addEventListener("click",()=>{if(answers.length===asked.pairs.length)undo();else{stopped=false;show()}});
at("voter").addEventListener("input",keep);
const keys={ArrowLeft:"left","1":"left",ArrowRight:"right","2":"right",ArrowDown:"tie","0":"tie"};
document.addEventListener("keydown",event=>{
if(event.repeat||event.ctrlKey||event.metaKey||event.altKey||event.target===at("voter"))return;
if(keys[event.key]&&!over()){event.preventDefault();answer(keys[event.key])}
else if(["u","U","Backspace","ArrowUp"].includes(event.key)&&!over()){event.preventDefault();undo()}});
const result=()=>JSON.stringify({format:asked.format,ballot:asked.ballot,voter:at("voter").value.trim(),answers});
at("save").addEventListener("click",()=>{const link=document.createElement("a");
link.href=URL.createObjectURL(new Blob([result()],{type:"application/json"}));
link.download=`vote-${asked.ballot.slice(0,12)}.json`;link.click();
at("told").textContent="Saved among your downloads."});
at("send").addEventListener("click",async()=>{at("send").disabled=true;
try{const said=await fetch("result",{method:"POST",headers:{"Content-Type":"application/json"},body:result()});
at("told").textContent=await said.text();if(!said.ok)at("send").disabled=false}
catch{at("told").textContent="The command does not answer. Save the answers instead.";at("send").disabled=false}});
show();
"""
