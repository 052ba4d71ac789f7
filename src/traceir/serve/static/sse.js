// Server-sent events from a fetch body. EventSource can neither POST nor send a key, so the format (HTML standard, 9.2) is read here.

// Feed it text as it comes; it returns the events that became complete. An event that no blank line ended is dropped.
export class SseParser {
  constructor() {
    this.rest = "";
    this.started = false;
    this.forget();
  }

  forget() {
    this.event = "";
    this.data = [];
  }

  push(text) {
    this.rest += text;
    if (!this.started && this.rest) {
      this.started = true;
      if (this.rest.startsWith("\uFEFF")) this.rest = this.rest.slice(1);
    }
    const events = [];
    for (;;) {
      const end = this.rest.search(/[\r\n]/);
      if (end < 0) return events;
      const isReturn = this.rest[end] === "\r";
      if (isReturn && end + 1 === this.rest.length) return events; // the \n of a \r\n may still come
      const line = this.rest.slice(0, end);
      this.rest = this.rest.slice(end + (isReturn && this.rest[end + 1] === "\n" ? 2 : 1));
      const complete = this.takeLine(line);
      if (complete) events.push(complete);
    }
  }

  // At the end of the stream: a \r that waited for a \n ends its line.
  finish() {
    return this.rest.endsWith("\r") ? this.push("\n") : [];
  }

  takeLine(line) {
    if (line === "") {
      const complete = this.data.length ? { event: this.event || "message", data: this.data.join("\n") } : null;
      this.forget();
      return complete;
    }
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "event") this.event = value;
    else if (name === "data") this.data.push(value);
    return null; // comments, id and retry mean nothing here
  }
}

// The events of a ReadableStream of bytes. The stream is cancelled when the caller stops reading.
export async function* readEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  const parser = new SseParser();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      yield* parser.push(done ? decoder.decode() : decoder.decode(value, { stream: true }));
      if (done) return yield* parser.finish();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
