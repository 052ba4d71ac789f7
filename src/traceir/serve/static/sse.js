// Server-sent events from a fetch body. EventSource can neither POST nor send a key, so the format (HTML standard, 9.2) is read here.

// Feed it text as it comes; it returns the events that became complete. An event that no blank line ended is dropped.
export class SseParser {
  rest = "";
  fields = { event: "", data: [] };

  push(text, over = false) {
    const lines = (this.rest + text).split(over ? /\r\n|\r|\n/ : /\r\n|\r(?!$)|\n/); // the \n of a \r\n may still come
    this.rest = lines.pop();
    return lines.map((line) => this.takeLine(line)).filter(Boolean);
  }

  takeLine(line) {
    const [, name, value = ""] = /^([^:]*)(?:: ?(.*))?$/s.exec(line);
    if (name === "event") this.fields.event = value;
    else if (name === "data") this.fields.data.push(value);
    if (line) return null; // comments, id and retry mean nothing here
    const { event, data } = this.fields;
    this.fields = { event: "", data: [] };
    return data.length ? { event: event || "message", data: data.join("\n") } : null;
  }
}

// The events of a ReadableStream of bytes. The stream is cancelled when the caller stops reading.
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  const parser = new SseParser();
  try {
    for (;;) {
      const { done, value = "" } = await reader.read();
      yield* parser.push(value, done);
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
