package qmp_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/internal/qmp"
	"nvstore.dev/internal/qtest"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}` + "\r\n"

// A command is what a fake QEMU gets.
type command struct {
	Execute   string
	Arguments json.RawMessage
	ID        json.RawMessage
}

// fake is a QEMU that answers with lines that a function makes. After the
// greeting and the capabilities it is serve's turn.
func fake(t *testing.T, o *qmp.Options, serve func(in func() command, out func(format string, args ...any))) *qmp.Client {
	t.Helper()
	ours, theirs := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() {
		defer theirs.Close()
		lines := bufio.NewScanner(theirs)
		in := func() (c command) {
			if lines.Scan() {
				_ = json.Unmarshal(lines.Bytes(), &c)
			}
			return c
		}
		out := func(format string, args ...any) { fmt.Fprintf(theirs, format+"\r\n", args...) }
		io.WriteString(theirs, greeting)
		out(`{"return": {}, "id": %s}`, in().ID)
		serve(in, out)
	})
	c, err := qmp.New(context.Background(), ours, o)
	require.NoError(t, err)
	t.Cleanup(func() {
		_ = c.Close()
		wg.Wait()
	})
	return c
}

func TestCommands(t *testing.T) {
	c := fake(t, nil, func(in func() command, out func(string, ...any)) {
		first, second := in(), in()
		if first.Execute != "echo" {
			first, second = second, first
		}
		// Answered in another order, with an event in between.
		out(`{"error": {"class": "CommandNotFound", "desc": "no such command"}, "id": %s}`, second.ID)
		out(`{"event": "STOP", "timestamp": {"seconds": 1700000000, "microseconds": 5}}`)
		out(`{"return": %s, "id": %s}`, first.Arguments, first.ID)
		in()
	})
	require.Equal(t, "7.2.22", c.Version().String())
	events, others := c.Subscribe(), c.Subscribe("RESUME")
	type echo struct{ Text string }
	got := make(chan echo)
	go func() {
		var e echo
		_ = c.Do(context.Background(), "echo", echo{"hello"}, &e)
		got <- e
	}()
	err := c.Do(context.Background(), "nonsense", nil, nil)
	refused := (*qmp.Error)(nil)
	require.ErrorAs(t, err, &refused)
	require.Equal(t, qmp.Error{Command: "nonsense", Class: "CommandNotFound", Desc: "no such command"}, *refused)
	require.Equal(t, echo{"hello"}, <-got)
	e := <-events.Events()
	require.Equal(t, "STOP", e.Name)
	require.EqualValues(t, 1700000000, e.Time.Unix())
	require.Empty(t, others.Events())
	others.Close()
	_, open := <-others.Events()
	require.False(t, open)
	require.NoError(t, c.Close())
	_, open = <-events.Events()
	require.False(t, open, "subscriptions end with the connection")
	require.ErrorIs(t, c.Do(context.Background(), "echo", nil, nil), qmp.ErrDisconnected)
	require.ErrorIs(t, c.Close(), net.ErrClosed)
}

// A command that isn't answered times out, and its late answer disturbs
// nothing.
func TestTimeout(t *testing.T) {
	late := make(chan struct{})
	c := fake(t, &qmp.Options{Timeout: 30 * time.Millisecond}, func(in func() command, out func(string, ...any)) {
		slow := in()
		<-late
		quick := in()
		out(`{"return": {}, "id": %s}`, slow.ID)
		out(`{"return": {}, "id": %s}`, quick.ID)
		in()
	})
	require.ErrorIs(t, c.Do(context.Background(), "slow", nil, nil), qmp.ErrTimeout)
	close(late)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	require.NoError(t, c.Do(ctx, "quick", nil, nil))
	cancel()
	require.ErrorIs(t, c.Do(ctx, "never", nil, nil), context.Canceled)
}

// A subscriber that sleeps costs a bounded memory and holds up nobody.
func TestSlowSubscriber(t *testing.T) {
	const n = 10000
	c := fake(t, nil, func(in func() command, out func(string, ...any)) {
		ask := in()
		for i := range n {
			out(`{"event": "E", "data": {"n": %d}, "timestamp": {"seconds": 1, "microseconds": 0}}`, i)
		}
		out(`{"return": {}, "id": %s}`, ask.ID)
		in()
	})
	s := c.Subscribe("E")
	require.NoError(t, c.Do(context.Background(), "flood", nil, nil))
	require.Equal(t, n, s.Missed()+len(s.Events()))
	require.NotZero(t, len(s.Events()))
	require.Less(t, len(s.Events()), 1000)
}

// A peer that breaks the protocol ends the connection, with the reason; what it
// sends is never taken for an answer.
func TestHostile(t *testing.T) {
	small := &qmp.Options{MaxMessage: 4096}
	for name, lie := range map[string]string{
		"NoJSON":       "hello",
		"NoObject":     `[1, 2]`,
		"Neither":      `{"id": 2}`,
		"Both":         `{"return": {}, "error": {"class": "GenericError", "desc": "x"}, "id": 2}`,
		"NoID":         `{"return": {}}`,
		"ErrorNoID":    `{"error": {"class": "GenericError", "desc": "JSON parse error"}}`,
		"OtherID":      `{"return": {}, "id": 77}`,
		"OldID":        `{"return": {}, "id": 1}`,
		"NegativeID":   `{"return": {}, "id": -2}`,
		"TextID":       `{"return": {}, "id": "2"}`,
		"GreetedTwice": strings.TrimSpace(greeting),
		"Long":         `{"return": "` + strings.Repeat("x", 5000) + `", "id": 2}`,
		"Deep":         strings.Repeat(`{"return":`, 400),
	} {
		t.Run(name, func(t *testing.T) {
			c := fake(t, small, func(in func() command, out func(string, ...any)) {
				in()
				out("%s", lie)
				in()
			})
			err := c.Do(context.Background(), "x", nil, nil)
			require.ErrorIs(t, err, qmp.ErrProtocol)
			<-c.Ended()
			require.ErrorIs(t, c.Err(), qmp.ErrProtocol)
		})
	}
	t.Run("HangUp", func(t *testing.T) {
		c := fake(t, nil, func(in func() command, out func(string, ...any)) { in() })
		require.ErrorIs(t, c.Do(context.Background(), "x", nil, nil), qmp.ErrDisconnected)
	})
	t.Run("WrongType", func(t *testing.T) {
		c := fake(t, nil, func(in func() command, out func(string, ...any)) {
			out(`{"return": [1], "id": %s}`, in().ID)
			in()
		})
		var s struct{ Status string }
		require.ErrorIs(t, c.Do(context.Background(), "query-status", nil, &s), qmp.ErrProtocol)
	})
	t.Run("Deaf", func(t *testing.T) {
		c := fake(t, &qmp.Options{Timeout: 20 * time.Millisecond}, func(in func() command, out func(string, ...any)) {
			time.Sleep(200 * time.Millisecond) // reads nothing
		})
		require.ErrorIs(t, c.Do(context.Background(), "x", nil, nil), qmp.ErrDisconnected)
	})
	t.Run("NeverAnswers", func(t *testing.T) {
		c := fake(t, &qmp.Options{Timeout: time.Minute}, func(in func() command, out func(string, ...any)) {
			for in().Execute != "" {
			}
		})
		gone, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		defer cancel()
		for i := 0; ; i++ {
			ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
			err := c.Do(ctx, "x", nil, nil)
			cancel()
			if errors.Is(err, qmp.ErrBusy) {
				break
			}
			require.ErrorIs(t, err, qmp.ErrTimeout)
			require.Less(t, i, 1000, "the number of commands without an answer is bounded")
		}
		<-gone.Done()
	})
}

func TestBadGreeting(t *testing.T) {
	for name, say := range map[string]string{
		"Nothing":   "",
		"NoQMP":     "{}\n",
		"Event":     `{"event": "STOP"}` + "\n",
		"NoVersion": `{"QMP": {}}` + "\n",
		"NBD":       "NBDMAGICIHAVEOPT\x00\x03",
		"Long":      strings.Repeat(" ", 5000),
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := net.Pipe()
			go func() {
				io.WriteString(theirs, say)
				theirs.Close()
			}()
			_, err := qmp.New(context.Background(), ours, &qmp.Options{MaxMessage: 4096})
			require.Error(t, err)
			require.True(t, errors.Is(err, qmp.ErrProtocol) || errors.Is(err, qmp.ErrDisconnected), "%v", err)
		})
	}
	t.Run("Silent", func(t *testing.T) {
		ours, theirs := net.Pipe()
		defer theirs.Close()
		_, err := qmp.New(context.Background(), ours, &qmp.Options{Timeout: 20 * time.Millisecond})
		require.ErrorIs(t, err, qmp.ErrBusy)
	})
	_, err := qmp.Dial(context.Background(), filepath.Join(t.TempDir(), "none"), nil)
	require.ErrorIs(t, err, os.ErrNotExist)
}

// TestQEMU talks with a real one: commands, refusals, events, jobs that
// succeed, fail and are waited for, and its end.
func TestQEMU(t *testing.T) {
	dir, err := os.MkdirTemp("", "qmp")
	require.NoError(t, err)
	defer os.RemoveAll(dir)
	sock := filepath.Join(dir, "qmp")
	m, err := qtest.Start("qemu-system-x86_64", "-m", "16", "-nodefaults",
		"-qmp", "unix:"+sock+",server=on,wait=off", "-blockdev", "driver=null-co,node-name=n,size=16777216,read-zeroes=on",
		"-blockdev", "driver=null-co,node-name=m,size=16777216,read-zeroes=on")
	require.NoError(t, err)
	defer m.Close()
	ctx := context.Background()
	c, err := qmp.Dial(ctx, "unix:"+sock, nil)
	require.NoError(t, err)
	defer c.Close()
	require.NotZero(t, c.Version().Major)

	_, err = qmp.Dial(ctx, sock, &qmp.Options{Timeout: 50 * time.Millisecond})
	require.ErrorIs(t, err, qmp.ErrBusy, "one client at a time")

	events := c.Subscribe("RESUME")
	require.NoError(t, c.Do(ctx, "cont", nil, nil))
	require.Equal(t, "RESUME", (<-events.Events()).Name)
	var status struct {
		Status  string
		Running bool
	}
	require.NoError(t, c.Do(ctx, "query-status", nil, &status))
	require.True(t, status.Running)
	refused := (*qmp.Error)(nil)
	require.ErrorAs(t, c.Do(ctx, "blockdev-del", map[string]string{"node-name": "none"}, nil), &refused)
	require.Contains(t, refused.Desc, "none")
	var schema []json.RawMessage
	require.NoError(t, c.Do(ctx, "query-qmp-schema", nil, &schema), "the longest answer that it has")
	require.Greater(t, len(schema), 500)

	var said []string
	require.NoError(t, c.RunJob(ctx, "blockdev-backup", map[string]any{"device": "n", "target": "m", "sync": "full", "auto-dismiss": false},
		func(j qmp.Job) { said = append(said, j.Status) }))
	require.Equal(t, "concluded", said[len(said)-1])
	failed := (*qmp.JobError)(nil)
	require.ErrorAs(t, c.RunJob(ctx, "snapshot-delete", map[string]any{"tag": "x", "devices": []string{"n"}}, nil), &failed)
	require.NotEmpty(t, failed.Desc)
	require.ErrorAs(t, c.RunJob(ctx, "snapshot-load", nil, nil), &refused)
	// One that would take for ever is cancelled.
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, c.RunJob(short, "blockdev-backup", map[string]any{"device": "n", "target": "m", "sync": "full", "speed": 1, "auto-dismiss": false}, nil), qmp.ErrTimeout)
	jobs, err := c.Jobs(ctx)
	require.NoError(t, err)
	require.Empty(t, jobs, "nothing is left")

	require.NoError(t, m.Close())
	<-c.Ended()
	require.ErrorIs(t, c.Do(ctx, "query-status", nil, nil), qmp.ErrDisconnected)
}
