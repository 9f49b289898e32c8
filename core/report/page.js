"use strict";
// The previews are a row of figures; with scripts they become one figure with a slider and a play button.
for (const box of document.querySelectorAll(".timeline")) {
  const frames = [...box.querySelectorAll("figure")];
  if (frames.length < 2) continue;
  const controls = document.createElement("div");
  const play = document.createElement("button");
  const slider = document.createElement("input");
  const label = document.createElement("output");
  let timer = 0;

  const show = (index) => {
    frames.forEach((frame, i) => frame.classList.toggle("on", i === index));
    const text = frames[index].querySelector("figcaption").textContent;
    slider.value = String(index);
    slider.setAttribute("aria-valuetext", text);
    label.textContent = text;
  };
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
  };
  const start = () => {
    if (slider.value === slider.max) show(0);
    play.textContent = "Pause";
    timer = setInterval(() => {
      if (slider.value === slider.max) stop();
      else show(Number(slider.value) + 1);
    }, Math.min(500, 8000 / frames.length));
  };

  controls.className = "controls";
  play.type = "button";
  slider.type = "range";
  slider.min = "0";
  slider.max = String(frames.length - 1);
  slider.setAttribute("aria-label", "Training step of the preview");
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  play.addEventListener("click", () => (timer ? stop() : start()));
  controls.append(play, slider, label);
  box.append(controls);
  box.classList.add("live");
  box.removeAttribute("tabindex");
  stop();
  show(frames.length - 1);
}
