package qmp_test

import (
	"context"
	"net"
	"testing"
	"time"

	"nvstore.dev/internal/qmp"
)

// FuzzPeer: whatever a peer sends, the client ends, and what it takes for an
// answer came with the right id.
func FuzzPeer(f *testing.F) {
	f.Add([]byte(greeting + `{"return": {}, "id": 1}` + "\n" + `{"return": {}, "id": 2}` + "\n"))
	f.Add([]byte(greeting + `{"return": {}, "id": 1}` + "\n" + `{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}` + "\n"))
	f.Add([]byte(greeting + `{"return": {}, "id": 1}` + "\n" + `{"error": {"class": "GenericError", "desc": "no"}, "id": 2}` + "\n"))
	f.Add([]byte(`{"QMP": {"version": null}}`))
	f.Fuzz(func(t *testing.T, sent []byte) {
		ours, theirs := net.Pipe()
		go func() {
			buf := make([]byte, 4096)
			for {
				if _, err := theirs.Read(buf); err != nil {
					return
				}
			}
		}()
		go func() {
			theirs.Write(sent)
			theirs.Close()
		}()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		c, err := qmp.New(ctx, ours, &qmp.Options{MaxMessage: 1 << 16})
		if err != nil {
			if c != nil {
				t.Fatal("a client with an error")
			}
			theirs.Close()
			return
		}
		s := c.Subscribe()
		err = c.Do(ctx, "query-jobs", nil, nil)
		if err == nil && len(sent) < len(`{"return":{},"id":2}`) {
			t.Fatal("an answer out of nothing")
		}
		<-c.Ended()
		for range s.Events() {
		}
		c.Close()
	})
}
