// The AI SDK: text, streams, tools and objects by its OpenAI-compatible, OpenAI (Responses) and Anthropic providers.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { z } from "zod";

const [url, name] = process.argv.slice(2);
const apiKey = "unused";
const baseURL = `${url}/v1`;
const providers = {
  "openai-compatible": createOpenAICompatible({
    name: "kunserve",
    baseURL,
    apiKey,
    includeUsage: true,
    supportsStructuredOutputs: true,
  })(name),
  openai: createOpenAI({ baseURL, apiKey })(name),
  anthropic: createAnthropic({ baseURL, apiKey })(name),
};
// Small models call on and on where several calls are allowed.
const providerOptions = {
  kunserve: { parallel_tool_calls: false },
  openai: { parallelToolCalls: false },
  anthropic: { disableParallelToolUse: true },
};

const question = "What is the capital of France?";
const person = z.object({ name: z.string().max(12), role: z.enum(["captain", "cook"]) });
const weather = tool({
  description: "Tell the weather of a city.",
  inputSchema: z.object({ city: z.enum(["Paris", "Rome"]) }),
  execute: async ({ city }) => `18 degrees in ${city}`,
});

const flows = {
  async chat(model) {
    const { text, usage } = await generateText({ model, prompt: question, maxOutputTokens: 32 });
    assert.match(text, /Paris/);
    assert.ok(usage.outputTokens > 0);
  },

  async "chat stream"(model) {
    const streamed = streamText({ model, prompt: question, maxOutputTokens: 32 });
    let text = "";
    for await (const piece of streamed.textStream) text += piece;
    assert.match(text, /Paris/);
    assert.equal(await streamed.finishReason, "stop");
    assert.ok((await streamed.usage).outputTokens > 0);
  },

  async "multi turn"(model) {
    const messages = [
      { role: "user", content: question },
      { role: "assistant", content: "Paris." },
      { role: "user", content: "And what is the capital of Italy?" },
    ];
    const { text } = await generateText({ model, system: "Answer in one sentence.", messages, maxOutputTokens: 32 });
    assert.match(text, /Rome/);
  },

  async tools(model) {
    const { steps, text } = await generateText({
      model,
      prompt: "How is the weather in Paris?",
      tools: { weather },
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
      stopWhen: stepCountIs(2),
      maxOutputTokens: 64,
      providerOptions,
    });
    assert.match(steps[0].toolResults[0].output, /18 degrees in (Paris|Rome)/);
    assert.equal(steps.length, 2);
    assert.ok(text);
  },

  async "tools stream"(model) {
    const streamed = streamText({
      model,
      prompt: "How is the weather in Paris?",
      tools: { weather },
      toolChoice: { type: "tool", toolName: "weather" },
      maxOutputTokens: 64,
      providerOptions,
    });
    const kinds = [];
    for await (const part of streamed.fullStream) kinds.push(part.type);
    assert.ok(kinds.includes("tool-input-delta") && kinds.includes("tool-result"), kinds.join());
  },

  async "structured output"(model) {
    const prompt = "Describe a ship's cook named Ann.";
    const { output } = await generateText({ model, prompt, output: Output.object({ schema: person }), maxOutputTokens: 64 });
    person.parse(output);
  },

  async "structured output stream"(model) {
    const prompt = "Describe a ship's cook named Ann.";
    const streamed = streamText({ model, prompt, output: Output.object({ schema: person }), maxOutputTokens: 64 });
    const partial = [];
    for await (const object of streamed.partialOutputStream) partial.push(object);
    person.parse(partial.at(-1));
  },
};

const told = (error) => `${error?.name}: ${error?.responseBody ?? error?.message}`.replace(/\s+/g, " ").slice(0, 300);

for (const [provider, model] of Object.entries(providers)) {
  const { version } = JSON.parse(readFileSync(new URL(`node_modules/@ai-sdk/${provider}/package.json`, import.meta.url)));
  for (const [flow, run] of Object.entries(flows)) {
    let problem = null;
    try {
      await run(model);
    } catch (error) {
      console.error(error);
      problem = told(error);
    }
    console.log("FLOW " + JSON.stringify({ client: `@ai-sdk/${provider}`, version, flow, problem }));
  }
}
