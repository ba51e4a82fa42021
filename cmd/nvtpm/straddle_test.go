package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/machine/live"
	"nvstore.dev/nvstore"
)

// bystander is a blob that isn't the TPM's.
const bystander = "net0/nvm"

// opened opens a layout's store while no machine runs.
func opened(t testing.TB, l *layout) *nvstore.Store {
	t.Helper()
	cred, err := keyslot.RawKey(rawKey)
	require.NoError(t, err)
	s, err := nvstore.Open(l.store[1], &nvstore.Options{Key: cred})
	require.NoError(t, err)
	return s
}

// TestLiveStraddle: a snapshot is loaded behind nvtpm's back between two writes
// of one commit, and the second comes to a disk that was reverted. The TPM says
// so, by a failure and once in the log; nobody hangs; and loading the snapshot
// once more heals it, whatever else is in the store.
func TestLiveStraddle(t *testing.T) {
	for name, lay := range layouts() {
		t.Run(name, func(t *testing.T) {
			l := lay(t)
			content := bytes.Repeat([]byte("bystander"), 5000)
			s := opened(t, l)
			require.NoError(t, s.Put(bystander, content, nil))
			require.NoError(t, s.Close())
			lm := goLive(t, l, watching)
			lm.beginning()
			failures := 0
			for round := range 4 {
				want := fmt.Sprintf("%016x", 1000+round)
				lm.do("write %s", want)
				lm.snapshot("snapshot-save", "s")
				// The root that is held goes into either slot, and is
				// the child of neither.
				for i := range 2 + round%2 {
					lm.do("write %016x", 2000+i)
				}
				kind := aRoot
				if round >= 2 {
					kind = body
				}
				lost := lm.proxy.hold(kind)
				lm.begin("write ffffffffffffffff")
				lm.await(lost)
				before := lm.cuts()
				lm.snapshot("snapshot-load", "s")
				lm.proxy.release()
				got, err := lm.try("read 8")
				lm.qmp("query-status", nil)
				if round < 2 {
					require.ErrorContains(t, err, "TPM_RC_FAILURE", "nvtpm: %s", &lm.tpm.out)
				}
				if err != nil {
					failures++
					_, err = lm.try("read 8")
					require.ErrorContains(t, err, "TPM_RC_FAILURE")
					require.Equal(t, before+1, lm.cuts(), "nvtpm: %s", &lm.tpm.out)
					begin := time.Now()
					lm.snapshot("snapshot-load", "s")
					loaded := time.Since(begin).Round(time.Millisecond)
					got = lm.do("read 8")
					t.Logf("round %d: healed in %v, of which the load takes %v", round, time.Since(begin).Round(time.Millisecond), loaded)
				}
				require.Equal(t, want, got)
				lm.do("write %s", want)
				lm.snapshot("snapshot-delete", "s")
			}
			t.Logf("%d of 4 loads in the middle of a commit were failures until done again; nvtpm: %s", failures, &lm.tpm.out)
			lm.end()
			require.EqualValues(t, 1003, stored(t, l))
			s = opened(t, l)
			defer s.Close()
			got, err := s.Get(bystander)
			require.NoError(t, err)
			require.Equal(t, sha256.Sum256(content), sha256.Sum256(got))
			report, err := s.Check(t.Context(), nil)
			require.NoError(t, err)
			require.True(t, report.Clean(), "%+v", report)
		})
	}
}

// TestLiveGate: what snapshots through package machine/live, as "nvtool vm" does,
// waits for nvtpm's commits, and never cuts through one, however the guest
// writes.
func TestLiveGate(t *testing.T) {
	for name, lay := range layouts() {
		t.Run(name, func(t *testing.T) {
			l := lay(t)
			lm := goLive(t, l, watching)
			lm.beginning()
			m, err := live.Connect(t.Context(), lm.tpm.dir+"/services", &live.Options{Devices: l.nodes})
			require.NoError(t, err)
			defer m.Close()
			lm.do("write %016x", 1)
			require.NoError(t, m.Save(t.Context(), "s", nil))
			lm.do("write %016x", 2)
			seen := lm.proxy.hold(aRoot)
			lm.begin(fmt.Sprintf("write %016x", 3))
			lm.await(seen)
			loaded := make(chan error, 1)
			go func() { loaded <- m.Load(t.Context(), "s", nil) }()
			select {
			case err := <-loaded:
				require.Fail(t, "a snapshot was loaded in the middle of a commit", "%v", err)
			case <-time.After(500 * time.Millisecond):
			}
			lm.proxy.release()
			require.NoError(t, <-loaded)
			// The guest may have told of its write before the load.
			lm.begin("read 8")
			for said := ""; !strings.HasSuffix(said, fmt.Sprintf("ok %016x", 1)); {
				said, err = lm.text()
				require.NoError(t, err)
			}
			require.NoError(t, m.Delete(t.Context(), "s", nil))
			lm.do("write %016x", 0)

			rounds := imagetest.Scale(3)
			for i := range rounds {
				tag := fmt.Sprintf("s%d", i)
				lm.do("loop")
				time.Sleep(time.Duration(20+13*i%50) * time.Millisecond)
				require.NoError(t, m.Save(t.Context(), tag, nil))
				time.Sleep(time.Duration(20+17*i%50) * time.Millisecond)
				require.NoError(t, m.Load(t.Context(), tag, nil))
				lm.do("agree")
				lm.do("stop")
				require.NoError(t, m.Delete(t.Context(), tag, nil))
			}
			last := lm.do("agree")
			t.Logf("%d rounds; the guest wrote %s times", rounds, last)
			require.Zero(t, lm.cuts(), "nvtpm: %s", &lm.tpm.out)
			require.NotContains(t, lm.tpm.out.String(), "error")
			lm.end()
			require.Equal(t, last, fmt.Sprint(stored(t, l)))
		})
	}
}
