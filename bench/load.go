// The load generator of `make bench`: what asks must not be slower than what answers, so it is not Python.
//
//	load claims -addr HOST:PORT -path /jobs?query=... [-n 8] [-seconds 1] [-count 0] [-complete]
//	load wait   -addr HOST:PORT -path /jobs?query=...&wait=60 [-n 100]
//	load touch  -addr HOST:PORT -path /jobs?query=... [-n 8] [-seconds 1] [-count 0]
//	load start --acquire-job UUID ...      what a buildkite-agent does, as far as a scheduler can tell
//
// Everything measured is printed as JSON, latencies in microseconds. Only loopback addresses make sense: times of
// different processes are compared by CLOCK_MONOTONIC, which all processes of one machine share.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

func main() {
	commands := map[string]func([]string){"claims": claims, "touch": touch, "wait": wait, "start": agent}
	if len(os.Args) > 1 && os.Args[1] == "--version" {
		fmt.Println("buildkite-agent version 3.137.0+bench")
		return
	}
	if len(os.Args) < 2 || commands[os.Args[1]] == nil {
		fail(fmt.Errorf("usage: load claims|touch|wait|start"))
	}
	commands[os.Args[1]](os.Args[2:])
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "load:", err)
	os.Exit(1)
}

func must[T any](value T, err error) T {
	if err != nil {
		fail(err)
	}
	return value
}

// monotonic is CLOCK_MONOTONIC in nanoseconds: Python's time.monotonic_ns().
func monotonic() int64 {
	var now syscall.Timespec
	const clockMonotonic = 1
	syscall.Syscall(syscall.SYS_CLOCK_GETTIME, clockMonotonic, uintptr(unsafe.Pointer(&now)), 0)
	return now.Nano()
}

// --- Figures ---

type figures struct {
	Count    int            `json:"count"`
	Seconds  float64        `json:"seconds"`
	Rate     float64        `json:"rate"`
	P50      float64        `json:"p50_us"`
	P99      float64        `json:"p99_us"`
	Max      float64        `json:"max_us"`
	Statuses map[string]int `json:"statuses,omitempty"`
}

func summarize(latencies [][]time.Duration, took time.Duration) figures {
	var all []time.Duration
	for _, each := range latencies {
		all = append(all, each...)
	}
	sort.Slice(all, func(i, j int) bool { return all[i] < all[j] })
	at := func(share float64) float64 {
		if len(all) == 0 {
			return 0
		}
		return float64(all[int(share*float64(len(all)-1))].Nanoseconds()) / 1000
	}
	return figures{
		Count: len(all), Seconds: took.Seconds(), Rate: float64(len(all)) / took.Seconds(),
		P50: at(0.50), P99: at(0.99), Max: at(1),
	}
}

func report(value any) {
	must(0, json.NewEncoder(os.Stdout).Encode(value))
}

// together runs `work` once for each connection, all at the same time, and says how long it took.
func together(n int, work func(number int)) time.Duration {
	var done sync.WaitGroup
	started := time.Now()
	for number := range n {
		done.Add(1)
		go func() {
			defer done.Done()
			work(number)
		}()
	}
	done.Wait()
	return time.Since(started)
}

// --- HTTP, as little as there can be ---

type connection struct {
	net.Conn
	reader *bufio.Reader
	body   []byte
}

func dial(addr string) *connection {
	for try := 0; ; try++ {
		conn, err := net.DialTimeout("tcp", addr, 10*time.Second)
		if err == nil {
			return &connection{Conn: conn, reader: bufio.NewReader(conn)}
		}
		if try == 3 {
			fail(err)
		}
	}
}

func dialAll(addr string, n int) []*connection {
	connections := make([]*connection, n)
	for i := range connections {
		connections[i] = dial(addr)
	}
	return connections
}

// request is a request as it goes over the wire, made once and sent many times.
func request(method, path, headers string, body []byte) []byte {
	length := ""
	if method != "GET" {
		length = fmt.Sprintf("Content-Type: application/json\r\nContent-Length: %d\r\n", len(body))
	}
	return append([]byte(fmt.Sprintf("%s %s HTTP/1.1\r\nHost: localhost\r\n%s%s\r\n", method, path, headers, length)), body...)
}

// exchange sends a request and reads its answer: the status and the body, which the next exchange overwrites.
func (c *connection) exchange(request []byte) (string, []byte, error) {
	if _, err := c.Write(request); err != nil {
		return "", nil, err
	}
	status, length := "", 0
	for first := true; ; first = false {
		line, err := c.reader.ReadSlice('\n')
		if err != nil {
			return "", nil, err
		}
		line = bytes.TrimRight(line, "\r\n")
		if first {
			if len(line) < 12 {
				return "", nil, fmt.Errorf("no status line: %q", line)
			}
			status = string(line[9:12])
		} else if len(line) == 0 {
			break
		} else if name := "content-length:"; len(line) > len(name) && strings.EqualFold(string(line[:len(name)]), name) {
			length = must(strconv.Atoi(strings.TrimSpace(string(line[len(name):]))))
		}
	}
	if cap(c.body) < length {
		c.body = make([]byte, length)
	}
	c.body = c.body[:length]
	_, err := io.ReadFull(c.reader, c.body)
	return status, c.body, err
}

// member is a text of a JSON object, found without parsing the rest; "" when there is none.
func member(body []byte, name string) string {
	_, rest, _ := bytes.Cut(body, []byte(`"`+name+`":`))
	rest, found := bytes.CutPrefix(bytes.TrimLeft(rest, " "), []byte(`"`))
	if !found {
		return ""
	}
	text, _, _ := bytes.Cut(rest, []byte(`"`))
	return string(text)
}

// --- claims and touches ---

// work is what n workers do at the same time, each on a kept connection, until `count` or the time is used up.
type work struct {
	addr, path string
	n          int
	seconds    float64
	count      int64
}

func parseWork(name string, arguments []string, more func(*flag.FlagSet)) *work {
	flags, w := flag.NewFlagSet(name, flag.ExitOnError), &work{}
	flags.StringVar(&w.addr, "addr", "", "")
	flags.StringVar(&w.path, "path", "", "")
	flags.IntVar(&w.n, "n", 1, "connections")
	flags.Float64Var(&w.seconds, "seconds", 1, "")
	flags.Int64Var(&w.count, "count", 1<<40, "at most so many")
	more(flags)
	must(0, flags.Parse(arguments))
	return w
}

// run reports how long each step took, and how often it ended with which status.
func (w *work) run(connections []*connection, step func(number int) (string, error)) {
	latencies, statuses := make([][]time.Duration, w.n), make([]map[string]int, w.n)
	var taken atomic.Int64
	deadline := time.Now().Add(time.Duration(w.seconds * float64(time.Second)))
	took := together(w.n, func(number int) {
		statuses[number] = map[string]int{}
		for time.Now().Before(deadline) && taken.Add(1) <= w.count {
			started := time.Now()
			status, err := step(number)
			if err != nil {
				fail(err)
			}
			latencies[number] = append(latencies[number], time.Since(started))
			statuses[number][status]++
		}
	})
	result := summarize(latencies, took)
	result.Statuses = map[string]int{}
	for _, each := range statuses {
		for status, times := range each {
			result.Statuses[status] += times
		}
	}
	report(result)
}

// headersOf name a worker, as worker.py does.
func headersOf(number int) string {
	return fmt.Sprintf("X-Worker-ID: bench-%d\r\nX-Worker-Session: %d\r\n", number, os.Getpid())
}

// claims asks as fast as it is answered. With -complete each asks as a worker of its own that completes every job it
// is given: exit status 27, so that nobody is to blame that no agent was started.
func claims(arguments []string) {
	var complete bool
	w := parseWork("claims", arguments, func(flags *flag.FlagSet) { flags.BoolVar(&complete, "complete", false, "") })
	connections, claim := dialAll(w.addr, w.n), make([][]byte, w.n)
	for number := range claim {
		headers := ""
		if complete {
			headers = headersOf(number)
		}
		claim[number] = request("GET", w.path, headers, nil)
	}
	w.run(connections, func(number int) (string, error) {
		status, body, err := connections[number].exchange(claim[number])
		if !complete || status != "200" || err != nil {
			return status, err
		}
		end := fmt.Sprintf(`{"claim": "%s", "exit_status": 27}`, member(body, "claim"))
		path := "/jobs/" + member(body, "uuid") + "/complete"
		status, _, err = connections[number].exchange(request("POST", path, headersOf(number), []byte(end)))
		return status, err
	})
}

// touch claims one job for each worker; what it measures are the touches after that.
func touch(arguments []string) {
	w := parseWork("touch", arguments, func(*flag.FlagSet) {})
	connections, touch := dialAll(w.addr, w.n), make([][]byte, w.n)
	for number, worker := range connections {
		status, body, err := worker.exchange(request("GET", w.path, headersOf(number), nil))
		if err != nil || status != "200" {
			fail(fmt.Errorf("claim: %s %s %v", status, body, err))
		}
		path, claim := "/jobs/"+member(body, "uuid")+"/touch", fmt.Sprintf(`{"claim": "%s"}`, member(body, "claim"))
		touch[number] = request("POST", path, headersOf(number), []byte(claim))
	}
	w.run(connections, func(number int) (string, error) {
		status, _, err := connections[number].exchange(touch[number])
		return status, err
	})
}

// --- wait ---

// wait keeps n claims waiting until its standard input ends. For each that is answered with a job it prints the job's
// uuid and when (CLOCK_MONOTONIC) the answer was read.
func wait(arguments []string) {
	flags := flag.NewFlagSet("wait", flag.ExitOnError)
	addr := flags.String("addr", "", "")
	path := flags.String("path", "", "")
	n := flags.Int("n", 1, "claims that wait")
	must(0, flags.Parse(arguments))
	answers := make(chan string, 100_000)
	claim := request("GET", *path, "", nil)
	for _, worker := range dialAll(*addr, *n) {
		go func() {
			for {
				status, body, err := worker.exchange(claim)
				now := monotonic()
				if err != nil {
					answers <- fmt.Sprintf("lost %v\n", err)
					return
				}
				if status == "200" {
					answers <- fmt.Sprintf("%s %d\n", member(body, "uuid"), now)
				} else if status != "204" {
					answers <- fmt.Sprintf("lost %s %s\n", status, body)
					return
				}
			}
		}()
	}
	fmt.Println("waiting")
	go func() {
		out := bufio.NewWriter(os.Stdout)
		for line := range answers {
			must(out.WriteString(line))
			if len(answers) == 0 {
				must(0, out.Flush())
			}
		}
	}()
	must(io.Copy(io.Discard, os.Stdin))
}

// --- start ---

// agent registers, acquires its job, runs its command ("sleep 0.3"), finishes it and disconnects. Then it appends to
// the file BENCH_STAMPS: job, name, start and end of this process (Unix seconds).
func agent(arguments []string) {
	started := time.Now()
	options := map[string]string{}
	for i := 0; i+1 < len(arguments); i += 2 {
		options[arguments[i]] = arguments[i+1]
	}
	endpoint, token, uuid := os.Getenv("BUILDKITE_AGENT_ENDPOINT"), os.Getenv("BUILDKITE_AGENT_TOKEN"), options["--acquire-job"]
	call := func(method, path, body string) map[string]any {
		asked := must(http.NewRequest(method, endpoint+path, strings.NewReader(body)))
		asked.Header.Set("Authorization", "Token "+token)
		answer := must(http.DefaultClient.Do(asked))
		defer answer.Body.Close()
		if answer.StatusCode == http.StatusUnprocessableEntity {
			os.Exit(27)
		}
		var object map[string]any
		must(0, json.NewDecoder(answer.Body).Decode(&object))
		return object
	}
	about := must(json.Marshal(map[string]any{"name": options["--name"], "meta_data": []string{}}))
	token = call("POST", "/register", string(about))["access_token"].(string)
	call("POST", "/connect", "{}")
	job := call("PUT", "/jobs/"+uuid+"/acquire", "{}")
	call("PUT", "/jobs/"+uuid+"/start", "{}")
	command, _ := job["env"].(map[string]any)["BUILDKITE_COMMAND"].(string)
	if pause, found := strings.CutPrefix(command, "sleep "); found {
		time.Sleep(must(time.ParseDuration(pause + "s")))
	}
	call("PUT", "/jobs/"+uuid+"/finish", `{"exit_status": "0"}`)
	call("POST", "/disconnect", "{}")
	stamps := must(os.OpenFile(os.Getenv("BENCH_STAMPS"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600))
	seconds := func(at time.Time) float64 { return float64(at.UnixMicro()) / 1e6 }
	must(fmt.Fprintf(stamps, "%s %s %.6f %.6f\n", uuid, options["--name"], seconds(started), seconds(time.Now())))
}
