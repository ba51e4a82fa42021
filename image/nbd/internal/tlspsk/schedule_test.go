package tlspsk

import (
	"encoding/hex"
	"testing"

	"github.com/stretchr/testify/require"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	p, err := hex.DecodeString(s)
	require.NoError(t, err)
	return p
}

// RFC 8448, section 4: the binder of a resumption, which has another label
// than that of an external key, and is computed in the same way.
func TestBinderVectors(t *testing.T) {
	early := earlySecret(unhex(t, "4ecd0eb6ec3b4d87f5d6028f922ca4c5851a277fd41311c9e62d2c9492e1c4f3"))
	require.Equal(t, "9b2188e9b2fc6d64d71dc329900e20bb41915000f678aa839cbb797cb7d8332c", hex.EncodeToString(early.secret))
	base := deriveSecret(early.secret, "res binder", afterNothing())
	require.Equal(t, "69fe131a3bbad5d63c64eebcc30e395b9d8107726a13d074e389dbc8a4e47256", hex.EncodeToString(base))
	require.Equal(t, "5588673e72cb59c87d220caffe94f2dea9a3b1609f7d50e90a48227db9ed7eaa",
		hex.EncodeToString(expandLabel(base, "finished", nil, hashLen)))
	require.Equal(t, "3add4fb2d8fdf822a0ca3cf7678ef5e88dae990141c5924d57bb6fa31b9e5f9d",
		hex.EncodeToString(finishedMAC(base, unhex(t, "63224b2e4573f2d3454ca84b9d009a04f6be9e05711a8396473aefa01e924a14"))))
}

// NIST's test vector for the key schedule with a PSK and (EC)DHE
// (ACVP-Server, TLS-v1.3-KDF-RFC8446). Its "randoms" stand for messages.
func TestScheduleVectors(t *testing.T) {
	seen := newTranscript()
	early := earlySecret(unhex(t, "56288b726c73829f7a3e47b103837c8139acf552e7530c7a710b35ed41191698"))
	seen.Write(unhex(t, "e9137679e582ba7c1db41cf725f86c6d09c8c05f297bad9a65b552eaf524fde4"))
	handshake := early.next(unhex(t, "effe9ec26aa29fd750dfa6a10b944d74071595b27ee88887d5e11c84590b5cc3"))
	seen.Write(unhex(t, "23eccfd030790748c8f8d8a656fd98d717f1b62af3712f97211d2070b499f98a"))
	client, server := handshake.traffic("hs", seen.sum())
	require.Equal(t, "b32306c3ce9932c460a1fe6c0f060593974842036b96fa45049b7352e71c2ad2", hex.EncodeToString(client))
	require.Equal(t, "22787f8ca269d34bc549ac8ba19f2040938a3aa370d7cc9d60f720882b88d01b", hex.EncodeToString(server))
	master := handshake.next(make([]byte, hashLen))
	seen.Write(unhex(t, "c750eda6696cd101b142bd79e00e6ac8c5f2c0abc78dd64f4d991326659e9299"))
	client, server = master.traffic("ap", seen.sum())
	require.Equal(t, "47d7ea08397b5871154b0fe85584bcc30a87c69e84d69b56007c5b21f76493ba", hex.EncodeToString(client))
	require.Equal(t, "efbdb0c873c0480da57307083839a8984be25b9a8545e4fca029940fe2800565", hex.EncodeToString(server))
}

// What gnutls-cli 3.7.9 said for alice, of whose binder each byte before
// depends.
const gnutlsHello = "010001900303d6174c6f917ac05e55f0afc52697237dbb06e56d06b3ead4cc4373496e0e3eb1208b336b6c13c073fd163dd520c2c9fae3ca5c45921acc97c060" +
	"c79f9ee8da8070002a1302130313011304ccacc036c03500abccadc0a7009100aac0a6009000a9ccabc0a5008d00a8c0a4008c0100011d000500050100000000" +
	"000a00160014001700180019001d001e01000101010201030104000b00020100000d00220020040108090804040308070501080a0805050308080601080b0806" +
	"0603020102030016000000170000002300000033006b0069001700410478b55ad76140e2f59a0085356c539a192ad3c40ec6bcd4c902192573631f4a541965b6" +
	"a9ecdfc035f894de1477b05ec97ec0ca3f711c94464924040cbeb20cf0001d00209ef7a39922dabaa519b9c7074fd6d64289808ee3c774cc07b980491ef2a88c" +
	"52002b0009080304030303020301ff01000100002d0003020100001c0002400100290030000b0005616c6963650000000000212033dbe442d603f9634a2600cf" +
	"bcd06aef99a581da4c5d8ac534fbe5d548a1d04d"

func TestBinderOfGnuTLS(t *testing.T) {
	pick := func(msg []byte, keys map[string][]byte) (uint16, error) {
		h, err := parseClientHello(msg)
		if err == nil {
			err = h.enough()
		}
		if err != nil {
			return 0, err
		}
		_, index, err := (&Conn{keys: keys}).pick(h, msg, newTranscript())
		return index, err
	}
	msg := unhex(t, gnutlsHello)
	h, err := parseClientHello(msg)
	require.NoError(t, err)
	require.Equal(t, [][]byte{[]byte("alice")}, h.identities)
	require.Equal(t, []uint16{groupP256, groupX25519}, []uint16{h.shares[0].group, h.shares[1].group})
	_, err = pick(msg, testKeys)
	require.NoError(t, err)
	for i := 4; i < len(msg); i++ { // the first four are the frame
		msg[i] ^= 0x10
		_, err := pick(msg, testKeys)
		require.Error(t, err, "byte %d", i)
		msg[i] ^= 0x10
	}
}
