"use strict";
// The switch of colours, tokens one by one, and the slider through the steps of unmasking.

const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const read = (id) => JSON.parse(document.getElementById(id).textContent);

function switchTheme() {
  const box = document.querySelector(".theme");
  const choose = (name) => {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
  };
  let kept = "auto";
  try {
    kept = localStorage.getItem("theme") || kept;
  } catch { /* a browser may forbid it for files */ }
  for (const input of all("input", box)) {
    input.checked = input.value === kept;
    input.addEventListener("change", () => {
      choose(input.value);
      try {
        localStorage.setItem("theme", input.value);
      } catch { /* then it is not remembered */ }
    });
  }
  choose(kept);
  box.hidden = false;
}

function readTokens(box) {
  const tokens = all(".t", box);
  const readout = box.parentElement.querySelector(".readout");
  let here = -1;
  const show = (place) => {
    if (here >= 0) tokens[here].classList.remove("here");
    here = Math.max(0, Math.min(tokens.length - 1, place));
    tokens[here].classList.add("here");
    readout.textContent = tokens[here].title;
  };
  box.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: tokens.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(moves[event.key]);
  });
  box.addEventListener("pointerover", (event) => {
    const place = tokens.indexOf(event.target);
    if (place >= 0) show(place);
  });
}

function stepThrough(controls, steps) {
  const sample = controls.closest(".sample");
  const text = sample.querySelector(".written");
  const tokens = all(".t", text);
  const final = tokens.map((token) => token.textContent);
  const slider = controls.querySelector("input");
  const told = controls.querySelector("output");
  const play = controls.querySelector("button");
  let timer = 0;
  const show = (done) => {
    const pieces = tokens.map((token) => (token.classList.contains("given") ? undefined : null));
    const fresh = new Set();
    steps.slice(0, done).forEach((step, call) => {
      for (const [position, piece] of step) {
        pieces[position] = piece;
        if (call === done - 1 && piece !== null) fresh.add(position);
      }
    });
    tokens.forEach((token, place) => {
      const piece = pieces[place];
      token.textContent = piece ?? final[place];
      token.classList.toggle("masked", piece === null);
      token.classList.toggle("new", fresh.has(place) && done < steps.length);
    });
    text.classList.toggle("moving", done < steps.length);
    sample.classList.toggle("stepping", done < steps.length);
    for (const cursor of all(".cursor", sample)) {
      cursor.setAttribute("transform", `translate(0 ${done * cursor.dataset.call})`);
    }
    slider.value = done;
    told.textContent = `${done} of ${steps.length} calls`;
    slider.setAttribute("aria-valuetext", told.textContent);
  };
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
  };
  slider.addEventListener("input", () => {
    stop();
    show(Number(slider.value));
  });
  play.addEventListener("click", () => {
    if (timer) return stop();
    let done = Number(slider.value) % steps.length;
    show(done);
    play.textContent = "Pause";
    timer = setInterval(() => {
      done += 1;
      show(done);
      if (done >= steps.length) stop();
    }, Math.max(40, Math.min(250, 6000 / steps.length)));
  });
  controls.hidden = false;
}

switchTheme();
all(".passage").forEach(readTokens);
const steps = read("steps");
for (const controls of all(".controls")) stepThrough(controls, steps[controls.dataset.sample]);
